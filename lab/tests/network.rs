//! Network interfaces of a guest with our kernel: a TAP device, the host behind it, and the
//! metadata service beside it.

mod boot;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use boot::Boot;
use lab::private_network::{self, GUEST, HOST, Place, TAP};
use machine::{MetadataService, Outcome};
use mmds::{Metadata, Version};
use serde_json::json;

/// Whether to go on: this test runs in a network of its own.
fn inside(test: &str) -> bool {
    match private_network::enter(test) {
        Place::Inside => true,
        Place::Done => false,
        Place::Impossible => {
            let refused = machine::check_tap(TAP).unwrap_err().to_string();
            assert!(
                refused.contains("tap0") || refused.contains("/dev/net/tun"),
                "{refused}"
            );
            false
        }
    }
}

/// What the script printed, without the kernel's own lines.
fn said(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.starts_with('['));
    lines.map(|line| format!("{line}\n")).collect()
}

fn up() -> String {
    format!("ip address add {GUEST}/24 dev eth0; ip link set eth0 up")
}

#[test]
fn a_guest_has_the_address_and_size_of_packets_it_was_given_and_pings_the_host() {
    if !inside("a_guest_has_the_address_and_size_of_packets_it_was_given_and_pings_the_host") {
        return;
    }
    let mut boot = Boot::new();
    boot.rest = json!({"network-interfaces": [{
        "iface_id": "net0",
        "host_dev_name": TAP,
        "guest_mac": "06:00:AC:10:00:02",
        "mtu": 1400,
    }]});
    let (ended, text) = boot.run(&format!(
        "{}\ncat /sys/class/net/eth0/address /sys/class/net/eth0/mtu\n\
         ping -c 5 -i 0.1 -s 1372 {HOST} | grep -o '5 packets received'\n\
         poweroff -f",
        up()
    ));
    assert_eq!(said(&text), "06:00:ac:10:00:02\n1400\n5 packets received\n");
    assert_eq!(*ended.result.as_ref().unwrap(), Outcome::PowerOff, "{text}");
}

/// Far more than a queue holds, in both directions, in segments longer than a frame.
#[test]
fn tcp_streams_arrive_whole_in_both_directions() {
    if !inside("tcp_streams_arrive_whole_in_both_directions") {
        return;
    }
    const BYTES: usize = 24 << 20;
    let pattern = |n: usize| -> Vec<u8> {
        let mut state = 0x2545_f491_u32;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect()
    };
    let listener = TcpListener::bind((HOST, 7000)).unwrap();
    let server = std::thread::spawn(move || {
        let data = pattern(BYTES);
        // To the guest, then back from it.
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&data).unwrap();
        drop(stream);
        let (mut stream, _) = listener.accept().unwrap();
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        back == data
    });
    let mut boot = Boot::new();
    boot.vcpus = 2;
    boot.rest = json!({"network-interfaces": [{"iface_id": "net0", "host_dev_name": TAP}]});
    let (notes, told) = std::sync::mpsc::channel();
    let (ended, text) = boot.run_with(
        &format!(
            "{}; mkdir /mnt; mount -t tmpfs t /mnt\n\
             nc {HOST} 7000 < /dev/null > /mnt/data; ls -l /mnt/data | awk '{{ print $5 }}'\n\
             nc {HOST} 7000 < /mnt/data\n\
             poweroff -f",
            up()
        ),
        |machine| {
            let (_, net) = machine.handles().interfaces.remove(0);
            let counters = net.lock().unwrap().counters();
            move |line: &str| {
                if line == BYTES.to_string() {
                    let all: Vec<_> = counters.all().collect();
                    notes.send(all).unwrap();
                }
            }
        },
    );
    assert!(server.join().unwrap(), "{text}");
    assert_eq!(said(&text), format!("{BYTES}\n"));
    assert_eq!(*ended.result.as_ref().unwrap(), Outcome::PowerOff, "{text}");
    // Segments are made into frames by nobody.
    let counts = told.recv().unwrap();
    let count = |name| counts.iter().find(|(each, _)| *each == name).unwrap().1;
    let mean = count("rx_bytes_count") / count("rx_packets_count");
    assert!(mean > 5000, "{mean} bytes a frame: {counts:?}");
}

#[test]
fn metadata_are_served_beside_the_cable_also_without_a_network() {
    if !inside("metadata_are_served_beside_the_cable_also_without_a_network") {
        return;
    }
    let mut metadata = Metadata::new("vm", 4096, Instant::now()).unwrap();
    metadata.version = Version::V2;
    let value = json!({"latest": {"meta-data": {"ami-id": "ami-12345678"}}});
    metadata.store.put(value).unwrap();
    let service = MetadataService {
        metadata: Arc::new(Mutex::new(metadata)),
        counters: Arc::default(),
    };
    let mut boot = Boot::new();
    boot.metadata = Some(service.clone());
    boot.rest = json!({
        "network-interfaces": [{"iface_id": "net0", "host_dev_name": TAP}],
        "mmds-config": {"version": "V2", "network_interfaces": ["net0"]},
    });
    let (ended, text) = boot.run(
        "ip address add 10.9.9.9/24 dev eth0; ip link set eth0 up\n\
         ip route add 169.254.169.254 dev eth0\n\
         wget -q -O - http://169.254.169.254/latest/meta-data/ami-id || echo refused\n\
         { printf 'PUT /latest/api/token HTTP/1.1\\r\\nHost: m\\r\\nConnection: close\\r\\n'\n\
           printf 'X-metadata-token-ttl-seconds: 60\\r\\n\\r\\n'; } > /request\n\
         token=$(nc 169.254.169.254 80 < /request | tail -n 1)\n\
         wget -q -O - --header \"X-metadata-token: $token\" \
             http://169.254.169.254/latest/meta-data/ami-id; echo\n\
         poweroff -f",
    );
    assert!(said(&text).ends_with("refused\nami-12345678\n"), "{text}");
    assert_eq!(*ended.result.as_ref().unwrap(), Outcome::PowerOff, "{text}");
    let counts: Vec<_> = service.counters.all().collect();
    assert!(counts.contains(&("rx_no_token", 1)), "{counts:?}");
}

#[test]
fn a_tap_device_that_goes_away_costs_the_network_and_nothing_else() {
    if !inside("a_tap_device_that_goes_away_costs_the_network_and_nothing_else") {
        return;
    }
    let mut boot = Boot::new();
    boot.rest = json!({"network-interfaces": [{"iface_id": "net0", "host_dev_name": TAP}]});
    let (ended, text) = boot.run_with(
        &format!(
            "{}\nping -c 1 {HOST} | grep -o '1 packets received'\n\
             for n in $(seq 100); do ping -c 1 -W 1 {HOST} > /dev/null || break; done\n\
             ping -c 2 -W 1 {HOST} | grep -o '0 packets received'; echo alive\n\
             poweroff -f",
            up()
        ),
        |_| {
            |line: &str| {
                if line.starts_with("1 packets") {
                    let mut ip = std::process::Command::new("ip");
                    assert!(ip.args(["link", "delete", TAP]).status().unwrap().success());
                }
            }
        },
    );
    assert_eq!(
        said(&text),
        "1 packets received\n0 packets received\nalive\n"
    );
    assert_eq!(*ended.result.as_ref().unwrap(), Outcome::PowerOff, "{text}");
}
