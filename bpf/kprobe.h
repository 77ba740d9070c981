/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What kprobes need that fentry and fexit do not: arguments where a function returns, and
 * notice of what the kernel skipped.
 *
 * A softirq that interrupts a kprobe, or whatever else the kernel runs no BPF program of a
 * kprobe in, hits none from its beginning to its end: they see all of a softirq or nothing.
 * Programs at tracepoints run there, and tell.
 */
#ifndef NFTRACE_KPROBE_H
#define NFTRACE_KPROBE_H

#include "maps.h"
#include "compat.h"

#ifdef NFTRACE_KPROBE
enum call_of {
	CALL_DEFRAG,
	CALL_DEFRAG6,
	CALL_QUEUE,
	CALL_REPLACE,
	CALL_LOOKUP,
	CALL_COMMIT,
	CALL_FLOW,
	CALL_FLOW6,
	CALL_EBT,
	CALL_EBT_REPLACE,
	CALL_EBT_SET,
};

/* A call that has not returned. */
struct call {
	u64 task; /* or, in a softirq, the CPU; or where in the stack it is */
	u32 of;	  /* enum call_of */
	u32 pad;
};

struct call_args {
	u64 a, b, c;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct call);
	__type(value, struct call_args);
} calls SEC(".maps");

static __always_inline void call_key(struct call *k, enum call_of of)
{
	k->task = in_softirq(this_cpu()) ? bpf_get_smp_processor_id() :
					   bpf_get_current_task();
	k->of = of;
	k->pad = 0;
}

static __always_inline int call_begins(enum call_of of, u64 a, u64 b)
{
	struct call_args args = { .a = a, .b = b };
	struct call k;

	call_key(&k, of);
	/* One that is there still has returned unseen. */
	if (bpf_map_update_elem(&calls, &k, &args, BPF_NOEXIST)) {
		count_loss(LOSS_SKIPPED);
		bpf_map_update_elem(&calls, &k, &args, BPF_ANY);
	}
	return 0;
}

static __always_inline bool call_take(struct call *k, struct call_args *args)
{
	struct call_args *had = bpf_map_lookup_elem(&calls, k);

	if (!had)
		return false;
	*args = *had;
	bpf_map_delete_elem(&calls, k);
	return true;
}

static __always_inline bool call_ends(enum call_of of, struct call_args *args)
{
	struct call k;

	call_key(&k, of);
	return call_take(&k, args);
}

/*
 * Calls of ebtables' functions, which may be within each other: by where in the stack they are.
 * What stands there still of one whose return was not seen is overwritten.
 */
static __always_inline int ebt_call_begins(u64 sp, enum call_of of, u64 a,
					   u64 b, u64 c)
{
	struct call k = { .task = sp, .of = of };
	struct call_args args = { .a = a, .b = b, .c = c };

	bpf_map_update_elem(&calls, &k, &args, BPF_ANY);
	return 0;
}

static __always_inline bool ebt_call_ends(u64 sp, enum call_of of,
					  struct call_args *args)
{
	struct call k = { .task = sp, .of = of };

	return call_take(&k, args);
}

/* A packet at a tracepoint: nothing more may be seen of it in this softirq. */
static __always_inline void unseen(struct sk_buff *skb)
{
	struct journey *j;

	if (!tracing || !blind())
		return;
	count_loss(LOSS_SKIPPED);
	j = journey_of(skb);
	if (j)
		j->seq++; /* a hole in its path */
}
#endif

#endif
