/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Packets that a flowtable of nf_tables sends on: its hook, at ingress, calls the device
 * itself, past routing and all rules of the hooks behind it.
 */
#ifndef NFTRACE_FLOW_H
#define NFTRACE_FLOW_H

#include "maps.h"
#include "compat.h"
#include "xt.h"

/*
 * Where what tells a flowtable's name is, counted from its struct nf_flowtable, which is within
 * struct nft_flowtable. The loader takes that from the type information of module nf_tables,
 * which probes in nf_flow_table cannot use.
 */
struct flow_layout {
	s32 name;  /* nft_flowtable.name */
	s32 table; /* nft_flowtable.table */
	u32 table_name, table_family;
};

struct flow_layout flow = {};

/* net/netfilter/nf_flow_table_ip.c: a flowtable looks at the packet. */
static __always_inline int flow_enter(struct sk_buff *skb, void *flowtable)
{
	struct journey *j = journey_of(skb);
	struct frame *f;

	if (!j)
		return 0;
	f = frame_of(j);
	if (f)
		f->flowtable = (u64)flowtable;
	return 0;
}

/* It did nothing with it. Else the packet has been seen elsewhere by now, or is gone. */
static __always_inline int flow_leave(struct sk_buff *skb, u32 verdict)
{
	struct journey *j;
	struct frame *f;

	if (verdict != NF_ACCEPT)
		return 0;
	j = journey_of(skb);
	if (!j)
		return 0;
	f = frame_of(j);
	if (f)
		f->flowtable = 0;
	return 0;
}

/* A packet is handed to a device: was it by a flowtable? */
static __noinline int flow_took(struct journey *j)
{
	struct frame *f = frame_of(j);
	struct rec_flow r = {};
	u64 table;

	if (!f || !f->flowtable)
		return 0;
	table = read_u64(f->flowtable + flow.table);
	r.family = read_u32(table + flow.table_family) & 0x3f;
	bpf_probe_read_kernel_str(r.table, sizeof(r.table),
				  (void *)read_u64(table + flow.table_name));
	bpf_probe_read_kernel_str(r.name, sizeof(r.name),
				  (void *)read_u64(f->flowtable + flow.name));
	rec_begin(&r.hdr, REC_FLOW, j, NULL, bpf_ktime_get_ns(),
		  bpf_get_smp_processor_id());
	r.hdr.netns = f->rec.hdr.netns;
	rec_send(&r, sizeof(r));
	/* It may have rewritten the packet. */
	f->nft = 1;
	return 0;
}

#endif
