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
            let generation = machine.handles().generation.unwrap();
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

/// The guest gives up memory, says how it is doing, takes it back.
#[test]
fn a_balloon_inflates_tells_statistics_and_deflates() {
    let mut boot = Boot::new();
    boot.rest = serde_json::json!({
        "balloon": {
            "amount_mib": 0,
            "deflate_on_oom": true,
            "stats_polling_interval_s": 1,
        },
    });
    let (notes, told) = std::sync::mpsc::channel();
    let (ended, text) = boot.run_with(
        "free_mib() { awk '/MemFree/ { print int($2 / 1024) }' /proc/meminfo; }\n\
         before=$(free_mib)\n\
         echo inflate\n\
         for n in $(seq 100); do [ $(free_mib) -lt $((before - 35)) ] && break; sleep 0.1; done\n\
         echo given up: $((before - $(free_mib) > 35))\n\
         echo deflate\n\
         for n in $(seq 100); do [ $(free_mib) -gt $((before - 5)) ] && break; sleep 0.1; done\n\
         echo left: $((before - $(free_mib) < 5))\n\
         poweroff -f",
        |machine| {
            let balloon = machine.handles().balloon.unwrap();
            move |line: &str| {
                let wanted = match line {
                    "inflate" => 40,
                    "deflate" => 0,
                    _ => return,
                };
                balloon.lock().unwrap().update(wanted).unwrap();
                let patience = std::time::Instant::now() + std::time::Duration::from_secs(20);
                loop {
                    let balloon = balloon.lock().unwrap();
                    let statistics = balloon.statistics().unwrap();
                    if balloon.actual_pages() == wanted * 256 && statistics.total_memory.is_some() {
                        notes.send((balloon.counts(), statistics)).unwrap();
                        return;
                    }
                    drop(balloon);
                    assert!(
                        std::time::Instant::now() < patience,
                        "no answer of the guest"
                    );
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
            }
        },
    );
    assert!(
        text.contains("given up: 1\n") && text.contains("left: 1\n"),
        "{text}"
    );
    let (counts, statistics) = told.recv().unwrap();
    // The guest's pages were all touched or not: what was given back was 40 MiB at most.
    assert_eq!(counts.inflated_bytes, 40 << 20);
    assert_eq!(counts.refused, 0);
    let total = statistics.total_memory.unwrap() >> 20;
    assert!((80..128).contains(&total), "{total} MiB");
    assert!(statistics.major_faults.is_some() && statistics.oom_kill.is_some());
    assert_eq!(*ended.result.as_ref().unwrap(), Outcome::PowerOff, "{text}");
}

#[test]
fn free_pages_are_reported_and_hinted_at() {
    let mut boot = Boot::new();
    boot.rest = serde_json::json!({
        "balloon": {
            "amount_mib": 0,
            "deflate_on_oom": false,
            "free_page_reporting": true,
            "free_page_hinting": true,
        },
    });
    let (notes, told) = std::sync::mpsc::channel();
    let (ended, text) = boot.run_with(
        // Reports come two seconds after pages became free.
        "mkdir /mnt; mount -t tmpfs t /mnt; dd if=/dev/zero of=/mnt/f bs=1M count=40 2>/dev/null\n\
         ls -s /mnt/f; rm /mnt/f; sleep 3; echo reported\n\
         for n in $(seq 50); do sleep 0.1; done\n\
         poweroff -f",
        |machine| {
            let balloon = machine.handles().balloon.unwrap();
            move |line: &str| {
                if line != "reported" {
                    return;
                }
                let reported = balloon.lock().unwrap().counts();
                balloon.lock().unwrap().start_hinting(true).unwrap();
                for _ in 0..200 {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    let hinting = balloon.lock().unwrap().hinting().unwrap();
                    if hinting.host_command == 1 {
                        break;
                    }
                }
                let balloon = balloon.lock().unwrap();
                notes
                    .send((reported, balloon.counts(), balloon.hinting()))
                    .unwrap();
            }
        },
    );
    let (reported, hinted, hinting) = told.recv().unwrap();
    assert!(text.contains("40960 /mnt/f\n"), "{text}");
    assert!(reported.reported_bytes > 30 << 20, "{reported:?} {text}");
    assert!(hinted.hinted_bytes > 30 << 20, "{hinted:?} {text}");
    assert_eq!(hinted.refused, 0);
    assert_eq!(hinting.unwrap().guest_command, Some(0));
    assert_eq!(*ended.result.as_ref().unwrap(), Outcome::PowerOff, "{text}");
}

#[test]
fn memory_is_plugged_used_and_unplugged() {
    let mut boot = Boot::new();
    boot.rest = serde_json::json!({
        "memory-hotplug": {
            "total_size_mib": 256,
            "block_size_mib": 2,
            "slot_size_mib": 128,
        },
    });
    let (notes, told) = std::sync::mpsc::channel();
    let (ended, text) = boot.run_with(
        "total_mib() { awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo; }\n\
         before=$(total_mib)\n\
         echo plug\n\
         for n in $(seq 100); do [ $(total_mib) -gt $((before + 100)) ] && break; sleep 0.1; done\n\
         echo more: $(($(total_mib) - before))\n\
         mkdir /mnt; mount -t tmpfs -o size=200m t /mnt\n\
         dd if=/dev/urandom of=/mnt/f bs=1M count=130 2>/dev/null && echo filled\n\
         md5sum < /mnt/f > /a; md5sum < /mnt/f | cmp - /a && echo same\n\
         rm /mnt/f /a\n\
         echo unplug\n\
         for n in $(seq 100); do [ $(total_mib) -lt $((before + 20)) ] && break; sleep 0.1; done\n\
         echo left: $(($(total_mib) - before))\n\
         poweroff -f",
        |machine| {
            let mem = machine.handles().mem.unwrap();
            move |line: &str| match line {
                "plug" => mem.lock().unwrap().request(128).unwrap(),
                "unplug" => mem.lock().unwrap().request(0).unwrap(),
                line if line.starts_with("more: ") || line.starts_with("left: ") => {
                    notes
                        .send(mem.lock().unwrap().status().plugged_mib)
                        .unwrap();
                }
                _ => {}
            }
        },
    );
    assert!(text.contains("filled\nsame\n"), "{text}");
    let plugged: Vec<u64> = told.iter().collect();
    assert_eq!(plugged.first(), Some(&128), "{text}");
    // What the guest's kernel keeps something in stays plugged.
    assert!(*plugged.last().unwrap() <= 20, "{plugged:?} {text}");
    assert_eq!(*ended.result.as_ref().unwrap(), Outcome::PowerOff, "{text}");
}
