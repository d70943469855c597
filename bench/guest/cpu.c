// CPU-bound user code, the same binary natively and as PID 1 of a guest.
// Prints "BENCH name milliseconds checksum" a line and, as PID 1, reboots, which ends its machine.
#include <stdio.h>
#include <sys/reboot.h>
#include <unistd.h>

#include "workloads.h"

int main(void) {
    static const struct {
        const char *name;
        unsigned (*run)(void);
    } workloads[] = {{"sieve", sieve}, {"qsort", sort}, {"sha256", sha256}, {"matmul", matmul}, {"fib", fib}, {"tree", tree}};
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (unsigned i = 0; i < sizeof workloads / sizeof *workloads; i++) {
        state = 12345;
        double start = now_ms();
        unsigned checksum = workloads[i].run();
        printf("BENCH %s %.2f %u\n", workloads[i].name, now_ms() - start, checksum);
    }
    if (getpid() == 1) {
        sync();
        reboot(RB_AUTOBOOT);
        for (;;) pause();
    }
    return 0;
}
