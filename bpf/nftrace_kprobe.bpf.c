//go:build ignore
// SPDX-License-Identifier: GPL-2.0
/* The probes for kernels that lack what fentry needs: see kernel.h and kprobe.h. */
#define NFTRACE_KPROBE
#include "nftrace.bpf.c"
