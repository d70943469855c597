//! guest x86-64 code in, host x86-64 code out; pure and safe.
