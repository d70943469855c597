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

/// Calls that pass with some arguments only.
const BY_ARGUMENT: &[i64] = &[
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_tgkill,
    libc::SYS_socket,
];

#[test]
fn each_filter_lets_what_is_listed_pass_and_traps_every_other_call() {
    let some = |calls: &[&[i64]]| calls.concat();
    let vcpu = [
        libc::SYS_arch_prctl,
        libc::SYS_fcntl,
        libc::SYS_rt_sigaction,
    ];
    let of_kvm: Vec<i64> = REFUSED
        .iter()
        .copied()
        .filter(|call| *call != libc::SYS_ioctl)
        .collect();
    let household = [libc::SYS_clone, libc::SYS_prctl];
    for (name, filter, any, refused, by_argument) in [
        (
            "software engine",
            Filter::for_translated_code().unwrap(),
            ANY,
            REFUSED.to_vec(),
            some(&[BY_ARGUMENT, &vcpu]),
        ),
        (
            "KVM",
            Filter::for_kvm().unwrap(),
            ANY,
            of_kvm,
            some(&[BY_ARGUMENT, &vcpu, &[libc::SYS_ioctl]]),
        ),
        (
            "disk",
            Filter::for_disks().unwrap(),
            disk::ANY,
            DISKS_REFUSED.to_vec(),
            vec![
                libc::SYS_mmap,
                libc::SYS_mprotect,
                libc::SYS_tgkill,
                libc::SYS_ioctl,
                libc::SYS_fcntl,
            ],
        ),
        (
            "household",
            Filter::for_household().unwrap(),
            household::ANY,
            vec![libc::SYS_clone3],
            some(&[BY_ARGUMENT, &household]),
        ),
    ] {
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
            // A mask of flags is met by all bits: threads are made, and code is not.
            if number == libc::SYS_clone && by_argument.contains(&number) {
                assert_eq!(odd, Verdict::Allow, "{name} {number}");
            } else {
                assert_eq!(odd, wanted, "{name} {number}");
            }
        }
        for call in by_argument {
            assert!(
                !any.contains(&call) && !refused.contains(&call),
                "{name} {call}"
            );
        }
        let other_arch = run(&filter.programs[0], 0x4000_0003, 0, [0; 6]);
        assert_eq!(other_arch, Verdict::Kill, "{name}: 32-bit calls");
        let x32 = verdict(&filter.programs, 0x4000_0000 | libc::SYS_execve, [0; 6]);
        assert_eq!(x32, Verdict::Trap, "{name}: calls of the x32 ABI");
    }
}

#[test]
fn arguments_decide_where_a_call_could_do_more() {
    let own = u64::from(std::process::id());
    let allow = |filter: &Filter, call, args: &[u64]| {
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        verdict(&filter.programs, call, all) == Verdict::Allow
    };
    let filters = [
        Filter::for_translated_code().unwrap(),
        Filter::for_kvm().unwrap(),
        Filter::for_household().unwrap(),
    ];
    for filter in &filters {
        for call in [libc::SYS_mmap, libc::SYS_mprotect] {
            assert!(allow(filter, call, &[0, 4096, 3]));
            assert!(!allow(filter, call, &[0, 4096, 5]));
        }
        assert!(allow(filter, libc::SYS_tgkill, &[own, 1, 6]));
        assert!(!allow(filter, libc::SYS_tgkill, &[own + 1, 1, 6]));
        assert!(allow(filter, libc::SYS_socket, &[1]));
        assert!(!allow(filter, libc::SYS_socket, &[2]));
    }
    let disk = Filter::for_disks().unwrap();
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        assert!(allow(&disk, call, &[0, 4096, 3]));
        assert!(!allow(&disk, call, &[0, 4096, 5]));
    }
    assert!(allow(&disk, libc::SYS_ioctl, &[0, KVM_IRQ_LINE]));
    assert!(!allow(&disk, libc::SYS_ioctl, &[0, KVM[0]]));
    assert!(!allow(&disk, libc::SYS_tgkill, &[own + 1, 1, 6]));
    // F_SETFL
    assert!(!allow(&disk, libc::SYS_fcntl, &[0, 4]));
    let [soft, kvm, household] = &filters;
    assert!(!allow(soft, libc::SYS_ioctl, &[0, KVM[0]]));
    for filter in [soft, kvm] {
        assert!(allow(filter, libc::SYS_ioctl, &[0, 0x4004_54d0]));
    }
    for request in KVM {
        assert!(allow(kvm, libc::SYS_ioctl, &[0, *request]));
    }
    // TIOCSTI, which types into a terminal
    assert!(!allow(kvm, libc::SYS_ioctl, &[0, 0x5412]));
    let thread = libc::CLONE_THREAD as u64;
    assert!(allow(household, libc::SYS_clone, &[thread | 0x100]));
    assert!(!allow(household, libc::SYS_clone, &[0x1200_0011]));
    assert!(allow(household, libc::SYS_prctl, &[15]));
    // PR_SET_DUMPABLE
    assert!(!allow(household, libc::SYS_prctl, &[4]));
}

#[test]
fn what_makes_processes_or_takes_privileges_is_on_no_list() {
    let never = [
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
    for call in never {
        for list in [ANY, REFUSED, household::ANY, disk::ANY, DISKS_REFUSED] {
            assert!(!list.contains(&call), "{call}");
        }
    }
}
