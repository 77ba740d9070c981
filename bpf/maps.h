/* SPDX-License-Identifier: GPL-2.0 */
#ifndef NFTRACE_MAPS_H
#define NFTRACE_MAPS_H

#include "kernel.h"
#include "event.h"

/* The records on their way to user space. Resized at load. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 8 << 20);
} records SEC(".maps");

/* A packet under way. */
struct journey {
	u64 id;
	u32 seq;
	u32 flags; /* JOURNEY_* */
	u64 flow;  /* hash of the flow, while JOURNEY_TENTATIVE */
	u32 frame; /* 1 + the frame of the hook that it is in (xt.h); 0: none */
	u32 queued; /* the same of the hook that last put it into a queue */
};

#define JOURNEY_MORPH	  0x1 /* the next release of the head is no death */
#define JOURNEY_TENTATIVE 0x2 /* the filter has not matched yet, but may */

/* The packets that are followed, by the address of their sk_buff. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u64);
	__type(value, struct journey);
} journeys SEC(".maps");

/* Where the filter lets packets be followed: namespaces and interfaces. */
struct iface {
	u32 netns;
	u32 ifindex;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, u32);
	__type(value, u8);
} filter_netns SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, struct iface);
	__type(value, u8);
} filter_ifaces SEC(".maps");

/* Addresses of the containers that were named; IPv4 in the first 4 bytes. */
struct addr {
	u8 b[16];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, struct addr);
	__type(value, u8);
} filter_addrs SEC(".maps");

/*
 * Flows of which a packet was followed lately that the filter never matched on its
 * way: by the low bits of the flow's hash. An older one there is forgotten.
 */
struct other_flow {
	u64 hash;
	u64 when; /* in jiffies */
};

#define OTHER_FLOWS 16384

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, OTHER_FLOWS);
	__type(key, u32);
	__type(value, struct other_flow);
} other_flows SEC(".maps");

/* Losses by cause (enum loss), per CPU. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, LOSS_MAX);
	__type(key, u32);
	__type(value, u64);
} losses SEC(".maps");

/*
 * What the loader knows of this kernel and what the user asked for. A filter
 * that is off costs nothing: the verifier drops its code.
 */
const volatile u32 nr_cpus = 1;		/* possible CPUs (nr_cpu_ids) */
const volatile bool use_filter = false; /* any of the following */
const volatile bool use_places = false; /* any of the next three */
const volatile bool use_netns = false;	/* filter_netns */
const volatile bool use_ifaces = false; /* filter_ifaces */
const volatile u64 iface_bits = 0;	/* bit index % 64 of each of them */
const volatile bool use_addrs = false;	/* filter_addrs */
const volatile bool use_expr = false;	/* filter_expr() is not "all" */
const volatile bool use_later =
	false; /* filter_expr() looks at what changes on the way */
const volatile bool use_detail =
	false; /* filter_expr() looks at what differs within a flow */
const volatile bool use_mac =
	false; /* filter_expr() looks at Ethernet addresses */
/* The records' bytes at which the reader is woken. */
const volatile u64 wake_bytes = 2 << 20;
/* How many copies of the probe of nf_hook_slow are attached, if it is not itself: see hook_enter. */
const volatile u32 hook_copies = 1;
/* Whether tasks preempt each other: hook_enter and nft_trace turn it off then. */
const volatile bool tasks_preempt = true;
/*
 * Addresses of the kernel's symbols, set before anything is attached, that of module
 * x_tables when it is loaded. A per-CPU symbol's is its offset. 0: unknown.
 */
u64 sym_per_cpu_offset = 0; /* __per_cpu_offset[] */
u64 sym_preempt_count = 0;  /* __preempt_count */
u64 sym_pcpu_hot = 0;	    /* pcpu_hot */
u64 sym_xt_recseq = 0;	    /* xt_recseq */
u64 sym_current_kprobe = 0; /* current_kprobe */
u64 sym_prog_active = 0;    /* bpf_prog_active */
u64 sym_hook_slow = 0;	    /* nf_hook_slow, and its length */
u64 hook_slow_size = 0;

/* Number of struct nftables_pernet in net->gen, for kernels that have it there. */
u32 nft_net_id = 0;

/* Where in it are commit_mutex.owner and, where it has that, base_seq. */
u32 nft_lock = 0;
u32 nft_seq = 0;

/* Number of struct ebt_pernet, and where a struct ebt_table has its name. */
u32 ebt_net_id = 0;
u32 ebt_name = 0;

/*
 * Number of journeys under way. While it is 0 the probes have nothing to do
 * but to look for the first packet that matches.
 */
u64 live = 0;

/*
 * Set while journeys begin: once all probes are attached, and until nftrace ends; then
 * those under way go on.
 */
u64 tracing = 0;

__verified_once int count_loss(u32 cause)
{
	u64 *n = bpf_map_lookup_elem(&losses, &cause);

	if (n)
		*n += 1;
	return 0;
}

static __always_inline struct journey *journey_of(const struct sk_buff *skb)
{
	u64 key = (u64)skb;

	if (!live)
		return NULL;
	return bpf_map_lookup_elem(&journeys, &key);
}

static __always_inline void rec_begin(struct rec_hdr *h, u16 type,
				      struct journey *j, struct net *net,
				      u64 now, u32 cpu)
{
	h->ts = now;
	h->type = type;
	h->cpu = cpu;
	h->flags = j->flags & JOURNEY_TENTATIVE ? REC_F_TENTATIVE : 0;
	h->netns = net ? get(net, ns.inum) : 0;
	h->jid = j->id;
	h->seq = j->seq++;
}

/* The next record is the first with a table, which is to be read before it is replaced. */
u64 wake_reader = 0;

/*
 * The reader polls; it is woken only when the buffer is filling up, because a wake-up costs
 * more than the record, and for a new table. One record in four, the first of a journey among
 * them, has a look at the buffer.
 */
static __always_inline u64 rec_wake(const struct rec_hdr *h)
{
	if (wake_reader) {
		wake_reader = 0;
		return BPF_RB_FORCE_WAKEUP;
	}
	if (h->seq % 4 == 0 &&
	    bpf_ringbuf_query(&records, BPF_RB_AVAIL_DATA) > wake_bytes)
		return BPF_RB_FORCE_WAKEUP;
	return BPF_RB_NO_WAKEUP;
}

/* Hands a record over. */
static __always_inline void rec_send(void *rec, u64 size)
{
	if (bpf_ringbuf_output(&records, rec, size, rec_wake(rec)))
		count_loss(LOSS_RINGBUF);
}

#endif
