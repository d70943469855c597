//! the software engine: MMU, local APIC, code cache, dispatch.
