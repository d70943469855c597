// SPDX-License-Identifier: GPL-2.0-only
//
// The first process of a machine that verify.sh boots: tries every feature the guest's kernel promises, prints one line for each
// ("ok NAME" or "FAIL NAME: reason") and a last one with the sum, then powers the machine off.
//
// Where a complete use would need a peer or a large set-up, the probe tells "unknown to this kernel" (ENOSYS, ENOENT, ENODEV,
// EAFNOSUPPORT, …) from "known, but your arguments are wrong". What each boot must find is said by verify.sh on the command line.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/filter.h>
#include <linux/if_addr.h>
#include <linux/if_link.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/loop.h>
#include <linux/membarrier.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nf_tables_compat.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netlink.h>
#include <linux/perf_event.h>
#include <linux/pkt_sched.h>
#include <linux/rtnetlink.h>
#include <linux/seccomp.h>
#include <linux/sock_diag.h>
#include <linux/vm_sockets.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

static int passed, failed;

// --- reporting ------------------------------------------------------------------------------------------------------------

static void report(bool good, const char *name, const char *reason) {
    if (good) {
        passed++;
        printf("ok %s\n", name);
    } else {
        failed++;
        printf("FAIL %s: %s\n", name, reason);
    }
}

static void check(bool good, const char *format, ...) {
    int saved = errno;
    char name[160];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(name, sizeof name, format, arguments);
    va_end(arguments);
    report(good, name, saved ? strerror(saved) : "not as expected");
    errno = 0;
}

static bool known(long result) {
    return result >= 0 || (errno != ENOSYS && errno != EOPNOTSUPP && errno != EAFNOSUPPORT);
}

static int read_file(const char *path, char *text, size_t room) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    text[0] = 0;
    if (fd < 0) return -1;
    size_t got = 0;
    ssize_t more;
    while (got + 1 < room && (more = read(fd, text + got, room - 1 - got)) > 0) got += (size_t)more;
    text[got] = 0;
    close(fd);
    return (int)got;
}

static bool write_file(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) return false;
    bool good = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    close(fd);
    return good;
}

// Is `word` one of the words of `text`?
static bool has_word(const char *text, const char *word) {
    size_t length = strlen(word);
    for (const char *at = text; (at = strstr(at, word)); at += length) {
        bool starts = at == text || strchr(" \t\n[", at[-1]);
        bool ends = at[length] == 0 || strchr(" \t\n]", at[length]);
        if (starts && ends) return true;
    }
    return false;
}

static char command_line[4096];

static bool asked(const char *word) { return has_word(command_line, word); }

// --- file systems ---------------------------------------------------------------------------------------------------------

static bool mounted(const char *what, const char *where, const char *type, unsigned long flags, const char *options) {
    mkdir(where, 0755);
    return mount(what, where, type, flags, options) == 0;
}

static void probe_file_systems(void) {
    static const char *const types[] = {"ext4",   "erofs",   "overlay", "tmpfs",     "devtmpfs", "fuse",   "virtiofs", "cgroup", "cgroup2",
                                        "mqueue", "devpts",  "bpf",     "hugetlbfs", "ramfs",    "cpuset", "sysfs",    "proc",   "binfmt_misc"};
    static char text[8192];
    // Mounting may be what registers it.
    check(mounted("binfmt_misc", "/tmp/binfmt", "binfmt_misc", 0, NULL), "mount binfmt_misc");
    read_file("/proc/filesystems", text, sizeof text);
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) check(has_word(text, types[i]), "filesystem %s", types[i]);

    check(mounted("tmpfs", "/tmp/t", "tmpfs", 0, "size=32m"), "mount tmpfs");
    check(write_file("/tmp/t/file", "x") && setxattr("/tmp/t/file", "user.a", "b", 1, 0) == 0, "tmpfs user xattr");
    check(setxattr("/tmp/t/file", "trusted.a", "b", 1, 0) == 0, "tmpfs trusted xattr");
    // An access ACL: version 2; user::rw-, user:1:r--, group::r--, mask::r--, other::---
    struct { uint32_t version; struct { uint16_t tag, perm; uint32_t id; } entry[5]; } acl = {
        2, {{1, 6, ~0u}, {2, 4, 1}, {4, 4, ~0u}, {16, 4, ~0u}, {32, 0, ~0u}}};
    check(setxattr("/tmp/t/file", "system.posix_acl_access", &acl, sizeof acl, 0) == 0, "tmpfs acl");

    mkdir("/tmp/t/lower", 0755), mkdir("/tmp/t/upper", 0755), mkdir("/tmp/t/work", 0755);
    write_file("/tmp/t/lower/below", "below");
    bool overlay = mounted("overlay", "/tmp/o", "overlay", 0, "lowerdir=/tmp/t/lower,upperdir=/tmp/t/upper,workdir=/tmp/t/work");
    check(overlay, "mount overlay");
    check(overlay && unlink("/tmp/o/below") == 0 && access("/tmp/t/lower/below", F_OK) == 0, "overlay whiteout");
    errno = 0;
    check(mounted("bpf", "/tmp/bpf", "bpf", 0, NULL), "mount bpf");
    check(mounted("mqueue", "/tmp/mqueue", "mqueue", 0, NULL), "mount mqueue");
    check(mounted("none", "/tmp/huge", "hugetlbfs", 0, NULL), "mount hugetlbfs");
    check(mounted("devpts", "/tmp/pts", "devpts", 0, "newinstance,ptmxmode=0666"), "mount devpts");
    int master = posix_openpt(O_RDWR | O_NOCTTY);
    check(master >= 0 || open("/tmp/pts/ptmx", O_RDWR | O_NOCTTY) >= 0, "pseudo-terminal");
    check(open("/dev/fuse", O_RDWR) >= 0, "fuse device");
    int control = open("/dev/loop-control", O_RDWR);
    check(control >= 0 && ioctl(control, LOOP_CTL_GET_FREE) >= 0, "loop device on demand");
    check(open("/dev/null", O_RDWR) >= 0 && open("/dev/urandom", O_RDONLY) >= 0, "devtmpfs nodes");
    static char features[64];
    read_file("/sys/fs/erofs/features/ztailpacking", features, sizeof features);
    check(strstr(features, "supported") != NULL, "erofs compression");
}

// The disks that verify.sh attaches: first an ext4, then an EROFS image, each with the file "hello".
static void probe_disks(void) {
    static char text[64];
    check(mounted("/dev/vda", "/tmp/ext4", "ext4", 0, NULL), "mount ext4 disk");
    check(read_file("/tmp/ext4/hello", text, sizeof text) > 0 && !strcmp(text, "hello\n"), "read ext4");
    check(write_file("/tmp/ext4/written", "x") && setxattr("/tmp/ext4/written", "user.a", "b", 1, 0) == 0, "write ext4 with xattr");
    check(umount("/tmp/ext4") == 0, "unmount ext4");
    check(mounted("/dev/vdb", "/tmp/erofs", "erofs", MS_RDONLY, NULL), "mount erofs disk");
    check(read_file("/tmp/erofs/hello", text, sizeof text) > 0 && !strcmp(text, "hello\n"), "read erofs");
    check(getxattr("/tmp/erofs/hello", "user.kept", text, sizeof text) > 0, "erofs xattr");
    static char large[1 << 16];
    check(read_file("/tmp/erofs/zeros", large, sizeof large) > 0, "read compressed erofs");
}

// --- virtio, platform -----------------------------------------------------------------------------------------------------

static void probe_platform(void) {
    static const char *const drivers[] = {"virtio_blk",  "virtio_net",  "virtio_rng", "virtio_balloon", "virtio_pmem",
                                          "virtiofs",    "virtio_mem",  "vmw_vsock_virtio_transport"};
    char path[160];
    static char text[16384];
    for (size_t i = 0; i < sizeof drivers / sizeof *drivers; i++) {
        snprintf(path, sizeof path, "/sys/bus/virtio/drivers/%s", drivers[i]);
        check(access(path, F_OK) == 0, "driver %s", drivers[i]);
    }
    check(access("/sys/bus/virtio/devices/virtio0", F_OK) == 0, "virtio-mmio device found");
    check(access("/sys/class/net/eth0", F_OK) == 0, "network device eth0");
    read_file("/sys/devices/virtual/misc/hw_random/rng_current", text, sizeof text);
    check(strstr(text, "virtio_rng") != NULL, "random numbers from virtio");
    check(access("/dev/vsock", F_OK) == 0, "vsock device");
    read_file("/proc/cpuinfo", text, sizeof text);
    int processors = 0;
    for (char *at = text; (at = strstr(at, "processor\t")); at++) processors++;
    check(processors == (asked("expect=smp") ? 2 : 1), "%d processors", processors);
    check((access("/sys/firmware/acpi/tables/DSDT", F_OK) == 0) == asked("expect=acpi"), "ACPI %s", asked("expect=acpi") ? "on" : "off");
    errno = 0;
    read_file("/sys/devices/system/memory/auto_online_blocks", text, sizeof text);
    check(!strcmp(text, "online\n"), "hot-plugged memory comes into use by itself");
    read_file("/sys/kernel/mm/transparent_hugepage/enabled", text, sizeof text);
    check(strstr(text, "[madvise]") != NULL, "transparent huge pages by madvise");
    check(access("/sys/kernel/mm/ksm/run", F_OK) == 0, "ksm");
    check(access("/proc/sys/vm/nr_hugepages", F_OK) == 0, "hugetlb");
    check(access("/proc/sys/kernel/core_pattern", F_OK) == 0, "core dumps");
    check(access("/proc/self/task/1/children", F_OK) == 0, "proc children");
    check(known(syscall(SYS_swapon, "/dev/null", 0)), "swap");
    check(access("/proc/modules", F_OK) != 0 && access("/proc/bus/pci", F_OK) != 0, "neither modules nor PCI");
    errno = 0;
    char seed[16];
    check(getrandom(seed, sizeof seed, GRND_NONBLOCK) == sizeof seed, "random numbers at once");
}

// --- namespaces, control groups -------------------------------------------------------------------------------------------

static void probe_namespaces(void) {
    static const struct { const char *name; int flag; } spaces[] = {
        {"mnt", CLONE_NEWNS}, {"uts", CLONE_NEWUTS}, {"ipc", CLONE_NEWIPC},       {"user", CLONE_NEWUSER},
        {"pid", CLONE_NEWPID}, {"net", CLONE_NEWNET}, {"cgroup", CLONE_NEWCGROUP}, {"time", 0x80}};
    for (size_t i = 0; i < sizeof spaces / sizeof *spaces; i++) {
        int status = 1;
        pid_t child = fork();
        if (child == 0) _exit(unshare(spaces[i].flag) == 0 ? 0 : errno);
        waitpid(child, &status, 0);
        errno = WEXITSTATUS(status);
        check(status == 0, "namespace %s", spaces[i].name);
    }
    // A user namespace's root may make the others.
    int status = 1;
    pid_t child = fork();
    if (child == 0) {
        if (setuid(1000)) _exit(errno);
        _exit(unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID) == 0 ? 0 : errno);
    }
    waitpid(child, &status, 0);
    errno = WEXITSTATUS(status);
    check(status == 0, "namespaces without privilege");
}

static void probe_control_groups(void) {
    static const char *const second[] = {"cpuset", "cpu", "io", "memory", "hugetlb", "pids", "misc"};
    static const char *const first[] = {"cpuset",  "cpu",        "cpuacct",  "blkio",   "memory", "devices", "freezer",
                                        "net_cls", "perf_event", "net_prio", "hugetlb", "pids",   "misc"};
    static char text[4096];
    char where[64];
    for (size_t i = 0; i < sizeof first / sizeof *first; i++) {
        snprintf(where, sizeof where, "/tmp/v1-%s", first[i]);
        bool good = mounted("cgroup", where, "cgroup", 0, first[i]);
        check(good, "cgroup v1 %s", first[i]);
        if (good) umount(where);
        errno = 0;
    }
    check(mounted("cgroup2", "/tmp/cgroup", "cgroup2", 0, NULL), "mount cgroup2");
    // A controller leaves its v1 hierarchy a moment after the unmount.
    for (int tries = 0; tries < 100; tries++) {
        size_t here = 0;
        read_file("/tmp/cgroup/cgroup.controllers", text, sizeof text);
        for (size_t i = 0; i < sizeof second / sizeof *second; i++) here += has_word(text, second[i]);
        if (here == sizeof second / sizeof *second) break;
        usleep(20000);
    }
    for (size_t i = 0; i < sizeof second / sizeof *second; i++) check(has_word(text, second[i]), "cgroup v2 %s", second[i]);
    write_file("/tmp/cgroup/cgroup.subtree_control", "+cpu +memory +io +pids +cpuset +hugetlb");
    mkdir("/tmp/cgroup/a", 0755);
    static const struct { const char *file, *value; } limits[] = {
        {"cpu.max", "50000 100000"}, {"cpu.weight", "50"}, {"memory.max", "16777216"}, {"memory.swap.max", "0"}, {"pids.max", "10"},
        {"cpuset.cpus", "0"},        {"io.max", "254:0 rbps=1048576"}, {"cgroup.freeze", "1"}, {"hugetlb.2MB.max", "0"}};
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        snprintf(where, sizeof where, "/tmp/cgroup/a/%s", limits[i].file);
        // Block devices get their numbers at run time.
        bool good = !strcmp(limits[i].file, "io.max") ? access(where, F_OK) == 0 : write_file(where, limits[i].value);
        check(good, "cgroup %s", limits[i].file);
    }
    check(access("/tmp/cgroup/io.cost.model", F_OK) == 0, "cgroup io.cost.model");
    check(access("/tmp/cgroup/a/io.latency", F_OK) == 0, "cgroup io.latency");
    check(access("/tmp/cgroup/a/io.prio.class", F_OK) == 0, "cgroup io.prio.class");
}

// --- BPF, seccomp, system calls -------------------------------------------------------------------------------------------

static int load_bpf(uint32_t type) {
    struct bpf_insn program[] = {{.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = 1}, {.code = BPF_JMP | BPF_EXIT}};
    union bpf_attr load = {.prog_type = type, .insns = (uintptr_t)program, .insn_cnt = 2, .license = (uintptr_t) "GPL"};
    return (int)syscall(SYS_bpf, BPF_PROG_LOAD, &load, sizeof load);
}

static void probe_bpf(void) {
    static char text[64];
    check(load_bpf(BPF_PROG_TYPE_SOCKET_FILTER) >= 0, "bpf socket filter");
    check(load_bpf(BPF_PROG_TYPE_SCHED_CLS) >= 0, "bpf traffic classifier");
    check(load_bpf(BPF_PROG_TYPE_XDP) >= 0, "bpf xdp");
    int program = load_bpf(BPF_PROG_TYPE_CGROUP_DEVICE);
    check(program >= 0, "bpf cgroup device");
    union bpf_attr attach = {.target_fd = (uint32_t)open("/tmp/cgroup/a", O_RDONLY | O_DIRECTORY),
                             .attach_bpf_fd = (uint32_t)program, .attach_type = BPF_CGROUP_DEVICE};
    check(syscall(SYS_bpf, BPF_PROG_ATTACH, &attach, sizeof attach) == 0, "bpf attached to a cgroup");
    union bpf_attr map = {.map_type = BPF_MAP_TYPE_HASH, .key_size = 4, .value_size = 8, .max_entries = 16};
    check(syscall(SYS_bpf, BPF_MAP_CREATE, &map, sizeof map) >= 0, "bpf map");
    read_file("/proc/sys/net/core/bpf_jit_enable", text, sizeof text);
    check(text[0] == '1', "bpf compiled");
}

static void probe_seccomp(void) {
    int status = 1;
    pid_t child = fork();
    if (child == 0) {
        struct sock_filter rules[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
                                      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
                                      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOTTY), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
        struct sock_fprog program = {4, rules};
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program)) _exit(1);
        _exit(syscall(SYS_getppid) == -1 && errno == ENOTTY ? 0 : 2);
    }
    waitpid(child, &status, 0);
    check(status == 0, "seccomp filter");
    uint32_t action = SECCOMP_RET_USER_NOTIF;
    check(syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &action) == 0, "seccomp user notification");
}

static void probe_system_calls(void) {
    static char parameters[120];
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGUSR1);
    check(syscall(SYS_io_uring_setup, 4, parameters) >= 0, "io_uring");
    check(epoll_create1(0) >= 0, "epoll");
    check(signalfd(-1, &signals, 0) >= 0, "signalfd");
    check(timerfd_create(CLOCK_MONOTONIC, 0) >= 0, "timerfd");
    check(eventfd(0, 0) >= 0, "eventfd");
    check(inotify_init1(0) >= 0, "inotify");
    check(fanotify_init(FAN_CLASS_NOTIF, 0) >= 0, "fanotify");
    unsigned long context = 0;
    check(syscall(SYS_io_setup, 4, &context) == 0, "asynchronous I/O");
    check(syscall(SYS_userfaultfd, O_CLOEXEC) >= 0, "userfaultfd");
    check(memfd_create("m", MFD_ALLOW_SEALING) >= 0, "memfd");
    check(syscall(SYS_mq_open, "q", O_RDWR | O_CREAT, 0600, NULL) >= 0, "POSIX message queue");
    check(syscall(SYS_shmget, 0, 4096, 0600) >= 0, "SysV shared memory");
    check(syscall(SYS_semget, 0, 1, 0600) >= 0, "SysV semaphores");
    check(syscall(SYS_msgget, 0, 0600) >= 0, "SysV messages");
    check(syscall(SYS_add_key, "user", "k", "v", 1, -2) >= 0, "keys");
    check(syscall(SYS_membarrier, MEMBARRIER_CMD_QUERY, 0, 0) > 0, "membarrier");
    check(known(syscall(SYS_rseq, NULL, 0, 0, 0)), "rseq");
    check(syscall(SYS_kcmp, getpid(), getpid(), 0, 0, 1) >= 0, "kcmp");
    check(known(syscall(SYS_process_vm_readv, getpid(), NULL, 0, NULL, 0, 0)), "process_vm_readv");
    check(syscall(SYS_pidfd_open, getpid(), 0) >= 0, "pidfd");
    int word = 0;
    check(syscall(SYS_futex, &word, 1, 1, NULL, NULL, 0) == 0, "futex");
    check(known(syscall(SYS_name_to_handle_at, AT_FDCWD, "/", NULL, NULL, 0)), "file handles");
    timer_t timer;
    check(timer_create(CLOCK_MONOTONIC, NULL, &timer) == 0, "POSIX timers");
    struct perf_event_attr event = {.type = PERF_TYPE_SOFTWARE, .size = sizeof event, .config = PERF_COUNT_SW_TASK_CLOCK};
    check(syscall(SYS_perf_event_open, &event, 0, -1, -1, 0) >= 0, "perf software events");

    // A script, run by its first line: this program again, told apart by its argument.
    write_file("/tmp/script", "#!/init script\n");
    chmod("/tmp/script", 0755);
    int status = 1;
    pid_t child = fork();
    if (child == 0) {
        execl("/tmp/script", "/tmp/script", NULL);
        _exit(1);
    }
    waitpid(child, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 42, "script");
}

// --- sockets, links -------------------------------------------------------------------------------------------------------

static int netlink(int protocol) {
    struct sockaddr_nl address = {.nl_family = AF_NETLINK};
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol);
    if (fd >= 0) bind(fd, (struct sockaddr *)&address, sizeof address);
    return fd;
}

struct message {
    struct nlmsghdr head;
    char body[1024];
};

static void *append(struct message *message, const void *data, size_t length) {
    char *at = (char *)message + NLMSG_ALIGN(message->head.nlmsg_len);
    if (data) memcpy(at, data, length);
    message->head.nlmsg_len = (uint32_t)(NLMSG_ALIGN(message->head.nlmsg_len) + length);
    return at;
}

static struct nlattr *attribute(struct message *message, uint16_t type, const void *data, size_t length) {
    struct nlattr head = {(uint16_t)(NLA_HDRLEN + length), type};
    struct nlattr *at = append(message, &head, sizeof head);
    if (length) append(message, data, length);
    return at;
}

static void text_attribute(struct message *message, uint16_t type, const char *text) { attribute(message, type, text, strlen(text) + 1); }

static void end_nest(struct message *message, struct nlattr *nest) {
    nest->nla_len = (uint16_t)((char *)message + message->head.nlmsg_len - (char *)nest);
}

static struct message start(uint16_t type, uint16_t flags) {
    struct message message = {0};
    message.head = (struct nlmsghdr){NLMSG_HDRLEN, type, (uint16_t)(NLM_F_REQUEST | flags), 1, 0};
    return message;
}

// Receives until an acknowledgement; the first error in it, 0 if none.
static int acknowledgement(int fd) {
    static char reply[8192];
    struct timeval limit = {1, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    for (;;) {
        ssize_t got = recv(fd, reply, sizeof reply, 0);
        if (got <= 0) return ETIMEDOUT;
        for (struct nlmsghdr *at = (struct nlmsghdr *)reply; NLMSG_OK(at, (size_t)got); at = NLMSG_NEXT(at, got))
            if (at->nlmsg_type == NLMSG_ERROR) return -((struct nlmsgerr *)NLMSG_DATA(at))->error;
    }
}

static int ask(int fd, struct message *message) {
    if (send(fd, message, message->head.nlmsg_len, 0) < 0) return errno;
    return acknowledgement(fd);
}

static int add_link(int fd, const char *kind, const char *name, int below, const void *options, size_t options_length) {
    struct message message = start(RTM_NEWLINK, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL);
    struct ifinfomsg info = {0};
    append(&message, &info, sizeof info);
    text_attribute(&message, IFLA_IFNAME, name);
    if (below) attribute(&message, IFLA_LINK, &below, sizeof below);
    struct nlattr *link = attribute(&message, IFLA_LINKINFO, NULL, 0);
    text_attribute(&message, IFLA_INFO_KIND, kind);
    if (options) {
        struct nlattr *data = attribute(&message, IFLA_INFO_DATA, NULL, 0);
        append(&message, options, options_length);
        end_nest(&message, data);
    }
    end_nest(&message, link);
    return ask(fd, &message);
}

static void probe_links(void) {
    int fd = netlink(NETLINK_ROUTE);
    check(fd >= 0, "route netlink");
    struct { struct nlattr head; uint16_t id, pad; } vlan = {{6, IFLA_VLAN_ID}, 7, 0};
    struct { struct nlattr head; uint32_t id; } vxlan = {{8, IFLA_VXLAN_ID}, 7};
    errno = add_link(fd, "dummy", "dum0", 0, NULL, 0), check(!errno, "link dummy");
    int below = (int)if_nametoindex("dum0");
    errno = add_link(fd, "bridge", "br0", 0, NULL, 0), check(!errno, "link bridge");
    errno = add_link(fd, "veth", "ve0", 0, NULL, 0), check(!errno, "link veth");
    errno = add_link(fd, "vlan", "vl0", below, &vlan, sizeof vlan), check(!errno, "link vlan");
    errno = add_link(fd, "macvlan", "mac0", below, NULL, 0), check(!errno, "link macvlan");
    errno = add_link(fd, "macvtap", "tap9", below, NULL, 0), check(!errno, "link macvtap");
    errno = add_link(fd, "ifb", "ifb9", 0, NULL, 0), check(!errno, "link ifb");
    errno = add_link(fd, "vxlan", "vx0", 0, &vxlan, sizeof vxlan), check(!errno, "link vxlan");
    errno = add_link(fd, "dummy", "dum1", 0, NULL, 0);
    errno = add_link(fd, "ipvlan", "ipv0", (int)if_nametoindex("dum1"), NULL, 0), check(!errno, "link ipvlan");

    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    int tun = open("/dev/net/tun", O_RDWR);
    check(tun >= 0 && ioctl(tun, TUNSETIFF, &request) == 0, "tap");

    // Options are missing: a known kind says so, an unknown kind is ENOENT.
    static const char *const queues[] = {"htb", "tbf", "fq_codel", "ingress", "clsact"};
    for (size_t i = 0; i < sizeof queues / sizeof *queues; i++) {
        struct message message = start(RTM_NEWQDISC, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE);
        bool inward = i >= 3;
        struct tcmsg place = {.tcm_ifindex = below, .tcm_parent = inward ? TC_H_INGRESS : TC_H_ROOT, .tcm_handle = inward ? 0xffff0000 : 0x10000};
        append(&message, &place, sizeof place);
        text_attribute(&message, TCA_KIND, queues[i]);
        errno = ask(fd, &message);
        check(errno != ENOENT, "queue %s", queues[i]);
    }
    static const char *const filters[] = {"u32", "matchall", "bpf", "cgroup"};
    for (size_t i = 0; i < sizeof filters / sizeof *filters; i++) {
        struct message message = start(RTM_NEWTFILTER, NLM_F_ACK | NLM_F_CREATE);
        struct tcmsg place = {.tcm_ifindex = below, .tcm_parent = 0xffff0000, .tcm_info = (uint32_t)(10 + i) << 16 | htons(3)};
        append(&message, &place, sizeof place);
        text_attribute(&message, TCA_KIND, filters[i]);
        errno = ask(fd, &message);
        check(errno != ENOENT, "filter %s", filters[i]);
    }
    static const char *const actions[] = {"mirred", "gact", "police", "bpf"};
    for (size_t i = 0; i < sizeof actions / sizeof *actions; i++) {
        struct message message = start(RTM_NEWACTION, NLM_F_ACK | NLM_F_CREATE);
        struct tcamsg family = {0};
        append(&message, &family, sizeof family);
        struct nlattr *list = attribute(&message, 1 /* TCA_ACT_TAB */, NULL, 0);
        struct nlattr *one = attribute(&message, 1, NULL, 0);
        text_attribute(&message, 1 /* TCA_ACT_KIND */, actions[i]);
        end_nest(&message, one);
        end_nest(&message, list);
        errno = ask(fd, &message);
        check(errno != ENOENT, "action %s", actions[i]);
    }
    close(fd);
}

static void probe_sockets(void) {
    check(socket(AF_INET, SOCK_STREAM, 0) >= 0, "socket inet");
    check(socket(AF_INET6, SOCK_STREAM, 0) >= 0, "socket inet6");
    check(socket(AF_UNIX, SOCK_STREAM, 0) >= 0, "socket unix");
    check(socket(AF_PACKET, SOCK_RAW, 0) >= 0, "socket packet");
    int diagnosis = netlink(NETLINK_SOCK_DIAG);
    static const struct { const char *name; int family, protocol; } tables[] = {
        {"inet tcp", AF_INET, 6}, {"inet udp", AF_INET, 17}, {"unix", AF_UNIX, 0}, {"packet", AF_PACKET, 0}, {"netlink", AF_NETLINK, 0}, {"vsock", AF_VSOCK, 0}};
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) {
        struct message message = start(SOCK_DIAG_BY_FAMILY, NLM_F_ACK | NLM_F_DUMP);
        char request[64] = {(char)tables[i].family, (char)tables[i].protocol};
        append(&message, request, 56);
        errno = 0;
        static char reply[16384];
        send(diagnosis, &message, message.head.nlmsg_len, 0);
        ssize_t got = recv(diagnosis, reply, sizeof reply, 0);
        struct nlmsghdr *head = (struct nlmsghdr *)reply;
        if (got > 0 && head->nlmsg_type == NLMSG_ERROR) errno = -((struct nlmsgerr *)NLMSG_DATA(head))->error;
        check(errno != ENOENT && errno != EAFNOSUPPORT, "socket diagnosis %s", tables[i].name);
        close(diagnosis);
        diagnosis = netlink(NETLINK_SOCK_DIAG);
    }

    int listener = socket(AF_VSOCK, SOCK_STREAM, 0), caller = socket(AF_VSOCK, SOCK_STREAM, 0);
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = 1024, .svm_cid = VMADDR_CID_ANY};
    bool listening = bind(listener, (struct sockaddr *)&address, sizeof address) == 0 && listen(listener, 1) == 0;
    address.svm_cid = VMADDR_CID_LOCAL;
    check(listening && connect(caller, (struct sockaddr *)&address, sizeof address) == 0, "vsock loopback");
}

// --- packet filter --------------------------------------------------------------------------------------------------------

static uint16_t nft_type(int operation) { return (uint16_t)(NFNL_SUBSYS_NFTABLES << 8 | operation); }

// One transaction of one operation; its error.
static int transact(int fd, struct message *operation) {
    char batch[2048];
    size_t length = 0;
    struct { struct nlmsghdr head; struct nfgenmsg family; } edge = {
        {20, NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, 0, 0}, {AF_UNSPEC, NFNETLINK_V0, htons(NFNL_SUBSYS_NFTABLES)}};
    memcpy(batch, &edge, 20), length = 20;
    operation->head.nlmsg_len = NLMSG_ALIGN(operation->head.nlmsg_len);
    memcpy(batch + length, operation, operation->head.nlmsg_len), length += operation->head.nlmsg_len;
    edge.head.nlmsg_type = NFNL_MSG_BATCH_END;
    memcpy(batch + length, &edge, 20), length += 20;
    if (send(fd, batch, length, 0) < 0) return errno;
    return acknowledgement(fd);
}

static int add_chain(int fd, const char *name, const char *type, uint32_t hook) {
    struct message message = start(nft_type(NFT_MSG_NEWCHAIN), NLM_F_CREATE | NLM_F_ACK);
    struct nfgenmsg family = {NFPROTO_INET, NFNETLINK_V0, 0};
    uint32_t at = htonl(hook), priority = htonl(0);
    append(&message, &family, sizeof family);
    text_attribute(&message, NFTA_CHAIN_TABLE, "t");
    text_attribute(&message, NFTA_CHAIN_NAME, name);
    struct nlattr *nest = attribute(&message, NFTA_CHAIN_HOOK | NLA_F_NESTED, NULL, 0);
    attribute(&message, NFTA_HOOK_HOOKNUM, &at, 4);
    attribute(&message, NFTA_HOOK_PRIORITY, &priority, 4);
    end_nest(&message, nest);
    text_attribute(&message, NFTA_CHAIN_TYPE, type);
    return transact(fd, &message);
}

// A rule of one expression without data: an unknown expression is ENOENT, a known one misses its data.
static int add_bare_rule(int fd, const char *expression) {
    struct message message = start(nft_type(NFT_MSG_NEWRULE), NLM_F_CREATE | NLM_F_APPEND | NLM_F_ACK);
    struct nfgenmsg family = {NFPROTO_INET, NFNETLINK_V0, 0};
    append(&message, &family, sizeof family);
    text_attribute(&message, NFTA_RULE_TABLE, "t");
    text_attribute(&message, NFTA_RULE_CHAIN, "nat");
    struct nlattr *list = attribute(&message, NFTA_RULE_EXPRESSIONS | NLA_F_NESTED, NULL, 0);
    struct nlattr *one = attribute(&message, NFTA_LIST_ELEM | NLA_F_NESTED, NULL, 0);
    text_attribute(&message, NFTA_EXPR_NAME, expression);
    struct nlattr *data = attribute(&message, NFTA_EXPR_DATA | NLA_F_NESTED, NULL, 0);
    end_nest(&message, data);
    end_nest(&message, one);
    end_nest(&message, list);
    return transact(fd, &message);
}

// Does nft_compat know the iptables extension?
static int ask_extension(int fd, const char *name, uint32_t revision, bool target) {
    struct message message = start(NFNL_SUBSYS_NFT_COMPAT << 8 | NFNL_MSG_COMPAT_GET, NLM_F_ACK);
    struct nfgenmsg family = {NFPROTO_IPV4, NFNETLINK_V0, 0};
    uint32_t wanted = htonl(revision), kind = htonl(target);
    append(&message, &family, sizeof family);
    text_attribute(&message, NFTA_COMPAT_NAME, name);
    attribute(&message, NFTA_COMPAT_REV, &wanted, 4);
    attribute(&message, NFTA_COMPAT_TYPE, &kind, 4);
    return ask(fd, &message);
}

static void probe_packet_filter(void) {
    int fd = netlink(NETLINK_NETFILTER);
    check(fd >= 0, "netfilter netlink");
    struct nfgenmsg family = {NFPROTO_INET, NFNETLINK_V0, 0};
    struct message table = start(nft_type(NFT_MSG_NEWTABLE), NLM_F_CREATE | NLM_F_ACK);
    append(&table, &family, sizeof family);
    text_attribute(&table, NFTA_TABLE_NAME, "t");
    errno = transact(fd, &table), check(!errno, "nftables inet table");
    errno = add_chain(fd, "nat", "nat", NF_INET_POST_ROUTING), check(!errno, "nftables nat chain");
    errno = add_chain(fd, "filter", "filter", NF_INET_FORWARD), check(!errno, "nftables filter chain");
    errno = add_chain(fd, "route", "route", NF_INET_LOCAL_OUT), check(!errno, "nftables route chain");
    static const char *const expressions[] = {"masq", "redir", "nat", "ct", "log", "limit", "counter", "reject", "fib", "numgen", "hash", "quota",
                                              "connlimit", "socket", "tproxy", "lookup", "meta", "payload", "cmp", "bitwise", "immediate",
                                              "match", "target", "dynset", "rt", "exthdr", "range", "objref"};
    for (size_t i = 0; i < sizeof expressions / sizeof *expressions; i++) {
        errno = add_bare_rule(fd, expressions[i]);
        check(errno != ENOENT && errno != EAGAIN, "nftables expression %s", expressions[i]);
    }
    // The control: a name that does not exist must be told apart.
    errno = add_bare_rule(fd, "no-such-thing");
    check(errno == ENOENT, "unknown nftables expression is refused");

    static const struct { const char *name; uint32_t revision; bool target; } extensions[] = {
        {"addrtype", 1, false}, {"conntrack", 3, false}, {"comment", 0, false}, {"mark", 1, false}, {"multiport", 1, false}, {"physdev", 0, false},
        {"state", 0, false}, {"limit", 0, false}, {"statistic", 0, false}, {"recent", 0, false}, {"owner", 1, false}, {"mac", 0, false},
        {"connmark", 1, false}, {"hashlimit", 2, false}, {"pkttype", 0, false}, {"cgroup", 1, false}, {"bpf", 1, false}, {"tcpmss", 0, false}, {"u32", 0, false},
        {"tcp", 0, false}, {"udp", 0, false}, {"icmp", 0, false},
        {"MASQUERADE", 0, true}, {"MARK", 2, true}, {"CONNMARK", 1, true}, {"DNAT", 2, true}, {"SNAT", 1, true}, {"REDIRECT", 0, true},
        {"LOG", 0, true}, {"NFLOG", 0, true}, {"REJECT", 0, true}, {"TCPMSS", 0, true}};
    for (size_t i = 0; i < sizeof extensions / sizeof *extensions; i++) {
        errno = ask_extension(fd, extensions[i].name, extensions[i].revision, extensions[i].target);
        check(!errno, "iptables %s %s", extensions[i].target ? "target" : "match", extensions[i].name);
    }

    // The legacy tables: struct ipt_getinfo starts with the table's name.
    static const char *const tables[] = {"filter", "nat", "mangle", "raw"};
    for (size_t i = 0; i < 4; i++) {
        char info[84] = {0};
        socklen_t length = sizeof info;
        strcpy(info, tables[i]);
        int raw = socket(AF_INET, SOCK_RAW, 255);
        check(getsockopt(raw, 0, 64 /* IPT_SO_GET_INFO */, info, &length) == 0, "legacy iptables table %s", tables[i]);
        close(raw);
        memset(info, 0, sizeof info);
        strcpy(info, tables[i]);
        raw = socket(AF_INET6, SOCK_RAW, 255);
        check(getsockopt(raw, 41, 64 /* IP6T_SO_GET_INFO */, info, &length) == 0, "legacy ip6tables table %s", tables[i]);
        close(raw);
    }
    check(access("/proc/sys/net/bridge/bridge-nf-call-iptables", F_OK) == 0, "bridge packets through iptables");
    check(access("/proc/sys/net/netfilter/nf_conntrack_max", F_OK) == 0, "connection tracking");
    check(access("/proc/sys/net/ipv4/tcp_syncookies", F_OK) == 0, "syn cookies");
}

int main(int count, char **arguments) {
    if (count > 1 && !strcmp(arguments[1], "script")) return 42;
    mkdir("/proc", 0755), mkdir("/sys", 0755), mkdir("/tmp", 0755), mkdir("/dev", 0755);
    bool early = mount("proc", "/proc", "proc", 0, NULL) == 0 && mount("sys", "/sys", "sysfs", 0, NULL) == 0 && mount("dev", "/dev", "devtmpfs", 0, NULL) == 0;
    int console = open("/dev/console", O_RDWR);
    if (console >= 0) dup2(console, 0), dup2(console, 1), dup2(console, 2);
    setvbuf(stdout, NULL, _IOLBF, 0);
    errno = 0;
    read_file("/proc/cmdline", command_line, sizeof command_line);
    check(early, "mount proc, sysfs, devtmpfs");

    probe_platform();
    probe_file_systems();
    probe_disks();
    probe_namespaces();
    probe_control_groups();
    probe_bpf();
    probe_seccomp();
    probe_system_calls();
    probe_sockets();
    probe_links();
    probe_packet_filter();

    printf("probe: %d ok, %d failed\n", passed, failed);
    fflush(stdout);
    sync();
    // The console may still hold text.
    usleep(100000);
    // Without ACPI there is nothing that could power off; a reboot ends the machine too.
    reboot(asked("expect=acpi") ? RB_POWER_OFF : RB_AUTOBOOT);
    for (;;) pause();
}
