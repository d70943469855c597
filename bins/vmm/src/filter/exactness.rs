//! Each filter's program, asked about every system call there is: what is listed passes,
//! all else traps.

use seccompiler::{BpfProgram, sock_filter};

use super::*;

/// What a program says to a call (Documentation/userspace-api/seccomp_filter.rst).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Allow,
    Errno,
    Trap,
    Kill,
}

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// Above the highest number of Linux 6.18, and a bit further.
const CALLS: i64 = 600;

/// Runs a classic BPF program as the kernel does, for the instructions that filters have.
fn run(program: &[sock_filter], arch: u32, number: u32, args: [u64; 6]) -> Verdict {
    // struct seccomp_data, include/uapi/linux/seccomp.h
    let mut data = [0_u8; 64];
    data[..4].copy_from_slice(&number.to_le_bytes());
    data[4..8].copy_from_slice(&arch.to_le_bytes());
    for (at, arg) in (16..).step_by(8).zip(args) {
        data[at..at + 8].copy_from_slice(&arg.to_le_bytes());
    }
    let (mut at, mut a) = (0_usize, 0_u32);
    loop {
        let it = &program[at];
        let jump = |holds: bool| usize::from(if holds { it.jt } else { it.jf });
        at += 1;
        match it.code {
            0x20 => {
                let k = it.k as usize;
                a = u32::from_le_bytes(data[k..k + 4].try_into().unwrap());
            }
            0x54 => a &= it.k,
            0x05 => at += it.k as usize,
            0x15 => at += jump(a == it.k),
            0x25 => at += jump(a > it.k),
            0x35 => at += jump(a >= it.k),
            0x45 => at += jump(a & it.k != 0),
            0x06 => {
                return match it.k & 0xffff_0000 {
                    0x7fff_0000 => Verdict::Allow,
                    0x0005_0000 => Verdict::Errno,
                    0x0003_0000 => Verdict::Trap,
                    0x8000_0000 | 0 => Verdict::Kill,
                    other => panic!("verdict {other:#x}"),
                };
            }
            other => panic!("instruction {other:#x}"),
        }
    }
}

/// Of several programs the strictest counts; kill, trap, errno, allow.
fn verdict(programs: &[BpfProgram], number: i64, args: [u64; 6]) -> Verdict {
    let all = programs
        .iter()
        .map(|program| run(program, AUDIT_ARCH_X86_64, number as u32, args));
    let strictness = |verdict: &Verdict| match verdict {
        Verdict::Allow => 0,
        Verdict::Errno => 1,
        Verdict::Trap => 2,
        Verdict::Kill => 3,
    };
    all.max_by_key(strictness).unwrap()
}

/// Calls that pass with some arguments only, on every thread.
const BY_ARGUMENT: &[i64] = &[
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_tgkill,
    libc::SYS_fcntl,
];

struct Wanted {
    name: &'static str,
    filter: Filter,
    any: Vec<i64>,
    refused: Vec<i64>,
    /// Besides [`BY_ARGUMENT`].
    by_argument: Vec<i64>,
}

fn every_filter() -> Vec<Wanted> {
    let with = |list: &[i64]| [every::ANY, list].concat();
    let vcpu = vec![
        libc::SYS_arch_prctl,
        libc::SYS_rt_sigaction,
        libc::SYS_socket,
    ];
    let but_ioctl = |list: &[i64]| -> Vec<i64> {
        let others = list.iter().filter(|call| **call != libc::SYS_ioctl);
        others.copied().collect()
    };
    vec![
        Wanted {
            name: "software engine",
            filter: Filter::for_translated_code().unwrap(),
            any: ANY.to_vec(),
            refused: REFUSED.to_vec(),
            by_argument: vcpu.clone(),
        },
        Wanted {
            name: "KVM",
            filter: Filter::for_kvm().unwrap(),
            any: ANY.to_vec(),
            refused: but_ioctl(REFUSED),
            by_argument: [vcpu, vec![libc::SYS_ioctl]].concat(),
        },
        Wanted {
            name: "disk",
            filter: Filter::for_disks().unwrap(),
            any: with(disk::ANY),
            refused: disk::REFUSED.to_vec(),
            by_argument: vec![libc::SYS_ioctl],
        },
        Wanted {
            name: "event loop",
            filter: Filter::for_event_loop().unwrap(),
            any: with(event_loop::ANY),
            refused: Vec::new(),
            by_argument: vec![
                libc::SYS_ioctl,
                libc::SYS_socket,
                libc::SYS_io_uring_register,
            ],
        },
        Wanted {
            name: "API",
            filter: Filter::for_api().unwrap(),
            any: with(api::ANY),
            refused: vec![libc::SYS_clone3],
            by_argument: vec![
                libc::SYS_ioctl,
                libc::SYS_socket,
                libc::SYS_io_uring_register,
                libc::SYS_prctl,
                libc::SYS_clone,
            ],
        },
        Wanted {
            name: "records",
            filter: Filter::for_records().unwrap(),
            any: with(records::ANY),
            refused: Vec::new(),
            by_argument: Vec::new(),
        },
        Wanted {
            name: "signals",
            filter: Filter::for_signals().unwrap(),
            any: with(signals::ANY),
            refused: signals::REFUSED.to_vec(),
            by_argument: Vec::new(),
        },
    ]
}

#[test]
fn each_filter_lets_what_is_listed_pass_and_traps_every_other_call() {
    for Wanted {
        name,
        filter,
        any,
        refused,
        by_argument,
    } in every_filter()
    {
        for number in 0..CALLS {
            // No listed value of any argument.
            let odd = verdict(&filter.programs, number, [u64::MAX; 6]);
            let wanted = if any.contains(&number) {
                Verdict::Allow
            } else if refused.contains(&number) {
                Verdict::Errno
            } else {
                Verdict::Trap
            };
            assert_eq!(odd, wanted, "{name} {number}");
        }
        for call in by_argument.iter().chain(BY_ARGUMENT) {
            assert!(
                !any.contains(call) && !refused.contains(call),
                "{name} {call}"
            );
        }
        let other_arch = run(&filter.programs[0], 0x4000_0003, 0, [0; 6]);
        assert_eq!(other_arch, Verdict::Kill, "{name}: 32-bit calls");
        let x32 = verdict(&filter.programs, 0x4000_0000 | libc::SYS_execve, [0; 6]);
        assert_eq!(x32, Verdict::Trap, "{name}: calls of the x32 ABI");
    }
}

/// All values of a request or command from 0 to 0xffff, and listed ones.
fn passing(filter: &Filter, call: i64, argument: usize, others: &[u64]) -> Vec<u64> {
    let tried = (0..=0xffff).chain(others.iter().copied());
    let mut passing: Vec<u64> = tried
        .filter(|value| {
            let mut args = [0; 6];
            args[argument] = *value;
            verdict(&filter.programs, call, args) == Verdict::Allow
        })
        .collect();
    passing.sort_unstable();
    passing.dedup();
    passing
}

#[test]
fn arguments_decide_where_a_call_could_do_more() {
    let own = u64::from(std::process::id());
    let allow = |filter: &Filter, call, args: &[u64]| {
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        verdict(&filter.programs, call, all) == Verdict::Allow
    };
    // Each request that any list has, and TIOCSTI, which types into a terminal.
    let requests = [KVM, api::REQUESTS, event_loop::REQUESTS, &[0x5412]].concat();
    let sorted = |lists: &[&[u64]]| {
        let mut all = lists.concat();
        all.sort_unstable();
        all.dedup();
        all
    };
    for Wanted { name, filter, .. } in every_filter() {
        for call in [libc::SYS_mmap, libc::SYS_mprotect] {
            assert!(allow(&filter, call, &[0, 4096, 3]), "{name}");
            assert!(!allow(&filter, call, &[0, 4096, 5]), "{name}");
        }
        assert!(allow(&filter, libc::SYS_tgkill, &[own, 1, 6]), "{name}");
        assert!(!allow(&filter, libc::SYS_tgkill, &[own + 1, 1, 6]));
        let advice = passing(&filter, libc::SYS_madvise, 2, &[]);
        assert_eq!(advice, sorted(&[every::ADVICE]), "{name}");
        let copies: &[u64] = if name == "API" { api::COPIES } else { &[] };
        let commands = passing(&filter, libc::SYS_fcntl, 1, &[]);
        assert_eq!(commands, sorted(&[every::DESCRIPTORS, copies]), "{name}");
        let of = passing(&filter, libc::SYS_ioctl, 1, &requests);
        let wanted = match name {
            "software engine" => vec![TUNSETOFFLOAD],
            "KVM" => sorted(&[KVM, &[TUNSETOFFLOAD]]),
            "disk" => vec![KVM_IRQ_LINE],
            "event loop" => sorted(&[event_loop::REQUESTS]),
            "API" => sorted(&[api::REQUESTS]),
            _ => Vec::new(),
        };
        assert_eq!(of, wanted, "{name}");
        let of = passing(&filter, libc::SYS_io_uring_register, 1, &[u32::MAX.into()]);
        let wanted = match name {
            "event loop" => sorted(&[event_loop::REGISTER]),
            "API" => sorted(&[api::REGISTER]),
            _ => Vec::new(),
        };
        assert_eq!(of, wanted, "{name}");
        let families = passing(&filter, libc::SYS_socket, 0, &[]);
        let unix_only = match name {
            "disk" | "records" | "signals" => Vec::new(),
            _ => vec![libc::AF_UNIX as u64],
        };
        assert_eq!(families, unix_only, "{name}");
    }
    let api = Filter::for_api().unwrap();
    assert!(allow(&api, libc::SYS_clone, &[api::A_THREAD]));
    for more in [libc::CLONE_NEWUSER, libc::CLONE_NEWNS, libc::CLONE_UNTRACED] {
        let flags = api::A_THREAD | more as u64;
        assert!(!allow(&api, libc::SYS_clone, &[flags]), "{more:#x}");
    }
    // What fork(3) asks for.
    assert!(!allow(&api, libc::SYS_clone, &[0x0120_0011]));
    let names = passing(&api, libc::SYS_prctl, 0, &[libc::PR_SET_VMA as u64]);
    assert_eq!(names, sorted(&[api::PRCTL]));
}

#[test]
fn what_makes_processes_or_takes_privileges_is_on_no_list() {
    let never = [
        // Filters do not see what is in a ring that is not restricted.
        libc::SYS_io_uring_setup,
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_fork,
        libc::SYS_vfork,
        libc::SYS_kill,
        libc::SYS_tkill,
        libc::SYS_rt_sigqueueinfo,
        libc::SYS_pidfd_send_signal,
        libc::SYS_pidfd_getfd,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_process_madvise,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_setuid,
        libc::SYS_setresuid,
        libc::SYS_setgroups,
        libc::SYS_capset,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_kexec_load,
        libc::SYS_reboot,
        libc::SYS_open_by_handle_at,
        libc::SYS_seccomp,
        libc::SYS_pkey_mprotect,
        libc::SYS_mknod,
        libc::SYS_mknodat,
        libc::SYS_chown,
        libc::SYS_chmod,
        libc::SYS_setxattr,
        libc::SYS_symlink,
        libc::SYS_link,
        libc::SYS_linkat,
    ];
    for Wanted {
        name,
        any,
        refused,
        by_argument,
        ..
    } in every_filter()
    {
        for call in never {
            let lists = [&any, &refused, &by_argument];
            assert!(
                !lists.iter().any(|list| list.contains(&call)),
                "{name} {call}"
            );
        }
    }
}
