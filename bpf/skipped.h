/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Hits of a program that the kernel skipped on a CPU, because the program was running there
 * already, or, of kprobes, another one: what it would have told of is missing.
 */
#ifndef NFTRACE_SKIPPED_H
#define NFTRACE_SKIPPED_H

#include "maps.h"
#include "compat.h"

/*
 * The program of nf_tables and its copies, so that they find their counters: nobody jumps to
 * them. Only where tasks preempt each other there are copies; the first one that is not skipped
 * tells.
 */
#define NFT_COPIES 4

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, NFT_COPIES);
	__type(key, u32);
	__type(value, u32);
} nft_program SEC(".maps");

/* Whether nf_tables tells what it does. */
u32 nft_on = 0;

/* Their counters (bpf_prog->stats, per CPU); 0 until one first ran, or if there is no such copy. */
u64 nft_stats[NFT_COPIES] = {};

static __noinline int find_nft_stats(void)
{
	void *map = &nft_program;
	u64 ptrs = 0, at;

	if (!bpf_core_field_exists(struct bpf_prog_stats, misses))
		return 0;
	/* The verifier lets nobody calculate with a map's address, but read it. */
	bpf_probe_read_kernel(&ptrs, sizeof(ptrs), &map);
	ptrs += bpf_core_field_offset(struct bpf_array, ptrs);
	/* The first one last: with it the counters are taken to be known. */
#pragma unroll
	for (int i = NFT_COPIES - 1; i >= 0; i--) {
		at = read_u64(ptrs + 8 * i);
		if (at)
			nft_stats[i] = read_u64(
				at +
				bpf_core_field_offset(struct bpf_prog, stats));
	}
	return 0;
}

/* How often a copy was skipped on the CPU whose variables are at percpu. */
static __always_inline u64 nft_misses(int i, u64 percpu)
{
	if (!bpf_core_field_exists(struct bpf_prog_stats, misses))
		return 0;
	return read_u64(nft_stats[i] + percpu +
			bpf_core_field_offset(struct bpf_prog_stats, misses));
}

static __always_inline void nft_count_skipped(u64 *skipped, u64 percpu)
{
#pragma unroll
	for (int i = 0; i < NFT_COPIES; i++) {
		if (i && !tasks_preempt)
			break;
		skipped[i] = nft_stats[i] ? nft_misses(i, percpu) : 0;
	}
}

#define ALL_COPIES ((1U << NFT_COPIES) - 1)

/* Which copies were skipped since: a bit for each, and for those that are not there. */
static __always_inline u32 nft_skipped(const u64 *skipped, u64 percpu)
{
	u32 all = ALL_COPIES;

#pragma unroll
	for (int i = 0; i < NFT_COPIES; i++) {
		if (i && !tasks_preempt)
			break;
		if (nft_stats[i] && skipped[i] == nft_misses(i, percpu))
			all &= ~(1U << i);
	}
	return all;
}

/* Whether there may have been a call that all copies missed; before are those of nft_skipped. */
static __always_inline bool nft_all_skipped(const u64 *skipped, u32 before,
					    u64 percpu)
{
	return (before | nft_skipped(skipped, percpu)) == ALL_COPIES;
}

/* Whether some of the probes are kprobes, where those of the hooks are not. */
u32 some_kprobes = 0;

/*
 * Whether kprobes that are hit now are skipped: kernel/kprobes.c:kprobe_running,
 * kernel/trace/bpf_trace.c:trace_call_bpf.
 */
static __always_inline bool blind(void)
{
	u64 percpu = this_cpu();

	return (sym_current_kprobe && read_u64(percpu + sym_current_kprobe)) ||
	       (sym_prog_active && read_u32(percpu + sym_prog_active));
}

#endif
