//! Devices that are about memory and identity, as our kernel's own drivers use them.

mod boot;

use boot::Boot;
use machine::Outcome;

#[test]
fn identifier_clock_and_their_events_are_in_the_guests_device_tree() {
    let (ended, text) = Boot::new().run(
        "cat /sys/bus/acpi/devices/AMZNC10C:00/path /sys/bus/acpi/devices/VMGENCTR:00/path\n\
         cat /sys/bus/acpi/devices/ACPI0013:00/path\n\
         grep -i '000f[ef]000' /proc/iomem\n\
         poweroff -f",
    );
    assert!(
        text.contains("\\_SB_.VCLK\n\\_SB_.VGEN\n\\_SB_.GED_\n"),
        "{text}"
    );
    // Nobody may use the pages as memory.
    assert!(text.contains("000fe000-000fffff : Reserved\n"), "{text}");
    assert_eq!(*ended.result.as_ref().unwrap(), Outcome::PowerOff, "{text}");
}

#[test]
fn a_guest_that_was_copied_draws_new_random_numbers() {
    let boot = Boot::new();
    let (ended, text) = boot.run_with(
        "echo ready\n\
         for n in $(seq 100); do dmesg | grep -q 'machine fork' && break; sleep 0.1; done\n\
         dmesg | grep -o 'crng reseeded due to.*'\n\
         awk '/ACPI:Ged/ { print \"event:\", $2 }' /proc/interrupts\n\
         poweroff -f",
        |machine| {
            let generation = machine.generation();
            move |line: &str| {
                if line == "ready" {
                    generation.lock().unwrap().bump().unwrap();
                }
            }
        },
    );
    assert!(
        text.contains("crng reseeded due to virtual machine fork\n"),
        "{text}"
    );
    // One event each for identifier and clock.
    assert_eq!(text.matches("event: 1\n").count(), 2, "{text}");
    assert_eq!(*ended.result.as_ref().unwrap(), Outcome::PowerOff, "{text}");
}
