/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Hits of a program that the kernel skipped on a CPU, because the program was running there
 * already: what it would have told of is missing.
 */
#ifndef NFTRACE_SKIPPED_H
#define NFTRACE_SKIPPED_H

#include "maps.h"
#include "compat.h"

/* The program of nf_tables, so that it finds its own counters: nobody jumps to it. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u32);
} nft_program SEC(".maps");

/* Whether nf_tables tells what it does. */
u32 nft_on = 0;

/* Its counters (bpf_prog->stats, per CPU); 0 until it first ran. */
u64 nft_stats = 0;

/* Of a program that is in nft_program. */
static __noinline int find_nft_stats(void)
{
	void *map = &nft_program;
	u64 at = 0;

	if (!bpf_core_field_exists(struct bpf_prog_stats, misses))
		return 0;
	/* The verifier lets nobody calculate with a map's address, but read it. */
	bpf_probe_read_kernel(&at, sizeof(at), &map);
	at = read_u64(at + bpf_core_field_offset(struct bpf_array, ptrs));
	if (at)
		nft_stats = read_u64(
			at + bpf_core_field_offset(struct bpf_prog, stats));
	return 0;
}

/* How often that happened on the CPU whose variables are at percpu. */
static __always_inline u64 nft_skipped(u64 percpu)
{
	return read_u64(nft_stats + percpu +
			bpf_core_field_offset(struct bpf_prog_stats, misses));
}

#endif
