/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Every question in one object, so that all programs share the rings and counters without a file system to pin them in.
 * Each program is still loaded and attached by itself.
 */
#include "aggregate.h"
#include "block.bpf.c"
#include "cgroup.bpf.c"
#include "drops.bpf.c"
#include "memory.bpf.c"
#include "oom.bpf.c"
#include "process.bpf.c"
#include "received.bpf.c"
#include "scheduler.bpf.c"
#include "signal.bpf.c"
#include "syscall.bpf.c"

char _license[] SEC("license") = "GPL";
