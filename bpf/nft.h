/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What nf_tables did with a packet: the kernel's own trace points.
 *
 * nft_do_chain calls __nft_trace_packet for each rule that ran to its end, each end of a
 * chain and each policy while any rule of the host has "meta nftrace set" in it, whether that is
 * for this packet or not. The loader keeps such a rule in a namespace of its own.
 *
 * Each call is a record, which user space puts together with that of the hook's call.
 */
#ifndef NFTRACE_NFT_H
#define NFTRACE_NFT_H

#include "maps.h"
#include "compat.h"
#include "packet.h"
#include "xt.h"

/* The generation of each namespace's rulesets that was met last. */
struct nft_gen {
	u32 gen;
	u32 parity; /* of the sum of net->nft.base_seq and gencursor, which a commit moves both */
	u32 sure; /* a commit has told so; else the first packet */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, u32);
	__type(value, struct nft_gen);
} nft_gens SEC(".maps");

static __always_inline u32 nft_cursor(struct net *net)
{
	return BPF_CORE_READ(net, nft.gencursor);
}

static __always_inline u32 nft_parity(struct net *net, u32 gen)
{
	return (gen + nft_cursor(net)) & 1;
}

/*
 * The generation that is in force while gencursor is cursor, which was read just now. A commit
 * counts base_seq up before it moves that. The reader is woken for a new one, which it has to read
 * before it is replaced.
 */
static __always_inline u32 nft_now(struct net *net, u32 netns, u32 cursor)
{
	struct nft_gen now, *had = bpf_map_lookup_elem(&nft_gens, &netns);

	now.gen = nft_generation(net);
	now.parity = (now.gen + cursor) & 1;
	now.sure = 0;
	if (had) {
		if (now.parity != had->parity)
			now.gen--;
		if (now.gen == had->gen)
			return now.gen;
		now.parity = had->parity;
		now.sure = had->sure;
	}
	bpf_map_update_elem(&nft_gens, &netns, &now, BPF_ANY);
	wake_reader = 1;
	return now.gen;
}

/* Has the packet recorded as the rule left it, where it has changed since it was last. */
static __always_inline void nft_packet(struct frame *f, struct journey *j,
				       struct sk_buff *skb, enum on on,
				       u32 flags)
{
	struct net *net = (void *)f->net;
	const struct pkt *was;
	struct scratch *s;
	struct rec_pkt *r;
	u32 key = on;

	s = bpf_map_lookup_elem(&scratches, &key);
	if (!s)
		return;
	r = &s->after;
	was = f->nft_changed ? &f->nft_pkt : &f->rec.before;
	read_data(&r->pkt, skb, number(get(skb, head)),
		  get(skb, network_header));
	if (same_data(&r->pkt, was, NO_NFCT) &&
	    (f->rec.place.pf != NFPROTO_BRIDGE || same_mac(was, skb)))
		return;
	read_pkt(&r->pkt, skb, net);
	f->nft_changed = 1;
	bpf_probe_read_kernel(&f->nft_pkt, sizeof(f->nft_pkt), &r->pkt);
	rec_begin(&r->hdr, REC_SEEN, j, NULL, bpf_ktime_get_ns(),
		  bpf_get_smp_processor_id());
	r->hdr.flags |= flags;
	r->hdr.netns = f->rec.hdr.netns;
	rec_send(r, sizeof(*r));
}

/* The packet has become another one between two chains. */
static __always_inline void nft_again(struct sk_buff *skb, struct journey *j,
				      enum on on)
{
	struct frame *f = frame_of(j);

	if (f && f->nft)
		nft_packet(f, j, skb, on, REC_F_BETWEEN);
}

/*
 * chain is where the rule stands, if that is at hand: rules behind which a chain ends lead to
 * it in newer kernels.
 */
static __always_inline int nft_did(struct sk_buff *skb,
				   const struct nft_base_chain *base,
				   const struct nft_verdict *verdict,
				   const struct nft_rule_dp *rule,
				   const struct nft_chain *chain, u32 type)
{
	struct journey *j = journey_of(skb);
	struct rec_nft r = {};
	struct frame *f;
	struct nft_table *table;
	u64 size = sizeof(r);
	u32 cursor;
	s32 code;

	if (!j)
		return 0;
	if (!nft_stats[0])
		find_nft_stats();
	f = frame_of(j);
	/* The hook's probe was skipped, or it is behind a queue of another kind than NFQUEUE's. */
	if (!f)
		return 0;
	if (tasks_preempt && !chain) {
		/* Another copy has told already. No call comes twice in a row. */
		if (f->nft_rule == (u64)rule && f->nft_basechain == (u64)base &&
		    f->nft_type == type)
			return 0;
		f->nft_rule = (u64)rule;
		f->nft_basechain = (u64)base;
		f->nft_type = type;
	}
	code = BPF_CORE_READ(verdict, code);
	if (type == NFT_TRACETYPE_POLICY) {
		r.what = NFT_DID_POLICY;
		code = BPF_CORE_READ(base, policy);
	} else if (code == NFT_CONTINUE &&
		   (type == NFT_TRACETYPE_RETURN ||
		    (bpf_core_field_exists(struct nft_rule_dp, is_last) &&
		     BPF_CORE_READ_BITFIELD_PROBED(rule, is_last)))) {
		r.what = NFT_DID_END;
		if (!chain && bpf_core_type_exists(struct nft_rule_dp_last))
			chain = BPF_CORE_READ((struct nft_rule_dp_last *)rule,
					      chain);
		r.chain = BPF_CORE_READ(chain, handle);
	} else {
		r.what = NFT_DID_RULE;
		r.rule = BPF_CORE_READ_BITFIELD_PROBED(rule, handle);
		if (code == NFT_JUMP || code == NFT_GOTO)
			r.chain = BPF_CORE_READ(verdict, chain, handle);
	}
	r.code = code;
	table = BPF_CORE_READ(base, chain.table);
	r.table = BPF_CORE_READ(table, handle);
	r.base = BPF_CORE_READ(base, chain.handle);
	r.family = BPF_CORE_READ_BITFIELD_PROBED(table, family);
	cursor = nft_cursor((void *)f->net);
	r.gen = nft_now((void *)f->net, f->rec.hdr.netns, cursor);
	r.flipped = cursor != f->nft_cursor;
	if (f->rec.ntables)
		r.runs = frame_runs(f);
	f->nft_cursor = cursor;
	/* A packet that was stolen is somebody else's by now. */
	if (code != NF_STOLEN) {
		u64 nfct = nfct_of(skb);

		r.ctinfo = nfct & 7;
		r.flags = nfct ? PKT_F_CT : 0;
		nft_packet(f, j, skb, f->task ? ON_NFT_TASK : ON_NFT, 0);
	}
	f->nft = 1;
	rec_begin(&r.hdr, REC_NFT, j, NULL, bpf_ktime_get_ns(),
		  bpf_get_smp_processor_id());
	r.hdr.netns = f->rec.hdr.netns;
	if (r.base == f->nft_base) {
		size = offsetof(struct rec_nft, name);
	} else {
		bpf_probe_read_kernel_str(r.name, sizeof(r.name),
					  BPF_CORE_READ(table, name));
		bpf_probe_read_kernel_str(r.chain_name, sizeof(r.chain_name),
					  BPF_CORE_READ(base, chain.name));
	}
	/* A verdict ends the run; what comes next is another one. */
	f->nft_base = code < 0 ? r.base : 0;
	rec_send(&r, size);
	return 0;
}

#endif
