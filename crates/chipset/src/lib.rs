//! serial port, i8042 reset, ACPI sleep registers.
