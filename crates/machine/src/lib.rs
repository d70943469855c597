//! boot, vCPU threads and event loop of one machine.
