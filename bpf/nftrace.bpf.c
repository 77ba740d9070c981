//go:build ignore
// SPDX-License-Identifier: GPL-2.0
/*
 * The probes. Each is a thin entry into a handler; what they have in common
 * stands in the headers: xt.h (rules of legacy tables), filter.h (which packets),
 * packet.h (what is recorded of them), compat.h (how kernels differ).
 */
#include "kernel.h"
#include "event.h"
#include "maps.h"
#include "compat.h"
#include "packet.h"
#include "filter.h"
#include "xt.h"

char _license[] SEC("license") = "GPL";

/* ---- journeys: from the first hook to the end of the skb ---- */

/* What a call of nf_hook_slow has to know when it returns: the skb may be gone. */
struct hook_call {
	u64 jid;
	u64 skb;
};

/* By the call's frame. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, u64);
	__type(value, struct hook_call);
} hook_calls SEC(".maps");

u64 open_hooks = 0;

/* Scratch space for the records, one per probe: a probe does not nest. */
enum { REC_SCRATCH_START, REC_SCRATCH_HOOK, REC_SCRATCH_MAX };

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, REC_SCRATCH_MAX);
	__type(key, u32);
	__type(value, struct rec_hook);
} rec_hook_scratch SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);
	__type(key, u32);
	__type(value, struct rec_nat);
} rec_nat_scratch SEC(".maps");

/* flow: hash, if the packet is followed tentatively; 0: the filter matched. */
static __always_inline struct journey *
journey_begin(struct sk_buff *skb, struct nf_hook_state *state, u64 flow)
{
	u64 key = (u64)skb;
	u32 cpu = bpf_get_smp_processor_id(), zero = REC_SCRATCH_START;
	struct journey new = {}, *j;
	struct rec_hook *rec;

	/* Two packets of one CPU never begin in the same nanosecond. */
	new.id = bpf_ktime_get_ns() << 8 | (cpu & 0xff);
	if (flow) {
		new.flags = JOURNEY_TENTATIVE;
		new.flow = flow;
	}
	if (bpf_map_update_elem(&journeys, &key, &new, BPF_NOEXIST)) {
		count_loss(LOSS_JOURNEYS);
		return NULL;
	}
	__sync_fetch_and_add(&live, 1);
	j = bpf_map_lookup_elem(&journeys, &key);
	rec = bpf_map_lookup_elem(&rec_hook_scratch, &zero);
	if (!j || !rec)
		return j;
	rec_begin(&rec->hdr, REC_START, j, state->net);
	if (matched_late(skb, state))
		rec->hdr.flags |= REC_F_LATE;
	read_place(&rec->place, skb, state);
	rec->ret = 0;
	read_pkt(&rec->pkt, skb, state->net);
	rec_send(rec, sizeof(*rec));
	return j;
}

static __always_inline void journey_forget(struct sk_buff *skb,
					   struct journey *j)
{
	u64 key = (u64)skb;
	struct other_flow *other;

	if (j->flags & JOURNEY_TENTATIVE) {
		other = other_flow(j->flow);
		if (other) {
			other->when = bpf_ktime_get_ns();
			other->hash = j->flow;
		}
	}
	if (!bpf_map_delete_elem(&journeys, &key))
		__sync_fetch_and_add(&live, -1);
}

static __always_inline void journey_end(struct sk_buff *skb, struct journey *j)
{
	struct rec_hdr h;

	rec_begin(&h, REC_END, j, NULL);
	journey_forget(skb, j);
	rec_send(&h, sizeof(h));
}

/* net/netfilter/core.c:nf_hook_slow: every packet at every hook passes here. */
SEC("fentry/nf_hook_slow")
int BPF_PROG(hook_enter, struct sk_buff *skb, struct nf_hook_state *state)
{
	struct hook_call call;
	struct journey *j = journey_of(skb);
	u64 frame = (u64)ctx;
	u64 flow = 0;
	enum match m;

	if (!j || j->flags & JOURNEY_TENTATIVE) {
		m = match(skb, state, &flow);
		if (!j) {
			if (m == MATCH_NO)
				return 0;
			j = journey_begin(skb, state,
					  m == MATCH_MAYBE ? flow : 0);
			if (!j)
				return 0;
		} else if (m == MATCH_YES) {
			j->flags &= ~JOURNEY_TENTATIVE;
		}
	}
	call.jid = j->id;
	call.skb = (u64)skb;
	if (!bpf_map_update_elem(&hook_calls, &frame, &call, BPF_NOEXIST))
		__sync_fetch_and_add(&open_hooks, 1);
	else
		bpf_map_update_elem(&hook_calls, &frame, &call, BPF_EXIST);
	return 0;
}

SEC("fexit/nf_hook_slow")
int BPF_PROG(hook_exit, struct sk_buff *skb, struct nf_hook_state *state,
	     const void *e, unsigned int s, int ret)
{
	struct hook_call *call;
	struct journey *j;
	u64 frame = (u64)ctx, jid;
	u32 key = REC_SCRATCH_HOOK;
	struct rec_hook *rec;

	if (!open_hooks)
		return 0;
	call = bpf_map_lookup_elem(&hook_calls, &frame);
	if (!call)
		return 0;
	jid = call->jid;
	if (call->skb != (u64)skb)
		jid = 0; /* an older call in this frame; its exit was missed */
	if (!bpf_map_delete_elem(&hook_calls, &frame))
		__sync_fetch_and_add(&open_hooks, -1);
	rec = bpf_map_lookup_elem(&rec_hook_scratch, &key);
	if (!jid || !rec)
		return 0;
	/* The skb is looked at only if it is still the same packet. */
	j = journey_of(skb);
	if (j && j->id != jid)
		j = NULL;
	rec_begin(&rec->hdr, REC_HOOK, j, state->net);
	if (!j) {
		rec->hdr.jid = jid;
		rec->hdr.seq = ~0U;
	}
	rec->place.hook = state->hook;
	rec->place.pf = state->pf;
	read_dev(&rec->place.in, state->in);
	read_dev(&rec->place.out, state->out);
	rec->place.physin = 0;
	rec->place.physout.ifindex = 0;
	rec->ret = ret;
	rec_send(rec, offsetof(struct rec_hook, pkt));
	return 0;
}

/* net/core/skbuff.c: neither of the two sees every death. */
SEC("fentry/kfree_skbmem")
int BPF_PROG(skb_free, struct sk_buff *skb)
{
	struct journey *j = journey_of(skb);

	if (j)
		journey_end(skb, j);
	return 0;
}

SEC("fentry/skb_release_head_state")
int BPF_PROG(skb_release, struct sk_buff *skb)
{
	struct journey *j = journey_of(skb);

	if (!j)
		return 0;
	if (j->flags & JOURNEY_MORPH)
		j->flags &= ~JOURNEY_MORPH;
	else
		journey_end(skb, j);
	return 0;
}

/*
 * net/core/skbuff.c:skb_morph: defragmentation turns the fragment that came last
 * into the whole packet. It stays the same journey.
 */
SEC("fentry/skb_morph")
int BPF_PROG(skb_morph, struct sk_buff *dst)
{
	struct journey *j = journey_of(dst);

	if (j)
		j->flags |= JOURNEY_MORPH;
	return 0;
}

/* ---- where the packet goes ---- */

static __always_inline int record_dev(struct sk_buff *skb,
				      struct net_device *dev, u16 type)
{
	struct journey *j = journey_of(skb);
	struct rec_dev rec;

	if (!j)
		return 0;
	if (j->flags & JOURNEY_TENTATIVE && dev && match_dev(skb, dev))
		j->flags &= ~JOURNEY_TENTATIVE;
	__builtin_memset(&rec, 0, sizeof(rec));
	rec_begin(&rec.hdr, type, j, dev ? dev->nd_net.net : NULL);
	read_dev(&rec.dev, dev);
	rec_send(&rec, sizeof(rec));
	return 1;
}

SEC("fentry/__dev_queue_xmit")
int BPF_PROG(dev_xmit, struct sk_buff *skb)
{
	record_dev(skb, skb->dev, REC_XMIT);
	return 0;
}

/* net/bridge/br_forward.c: br_forward and the flooding functions end here. */
SEC("fentry/__br_forward")
int BPF_PROG(br_forward, struct net_bridge_port *to, struct sk_buff *skb)
{
	if (live)
		record_dev(skb, to->dev, REC_BRIDGE);
	return 0;
}

static __always_inline void deliver(struct sk_buff *skb)
{
	struct journey *j = journey_of(skb);

	if (j && record_dev(skb, skb->dev, REC_DELIVER))
		journey_forget(skb, j);
}

SEC("fentry/ip_local_deliver_finish")
int BPF_PROG(deliver_ip, struct net *net, struct sock *sk, struct sk_buff *skb)
{
	deliver(skb);
	return 0;
}

SEC("fentry/ip6_input_finish")
int BPF_PROG(deliver_ip6, struct net *net, struct sock *sk, struct sk_buff *skb)
{
	deliver(skb);
	return 0;
}

/* ---- NAT ---- */

static __always_inline int nat(struct sk_buff *skb, struct nf_conn *ct,
			       u32 mtype, u32 dir, u32 after)
{
	struct journey *j = journey_of(skb);
	struct rec_nat *rec;

	if (!j)
		return 0;
	rec = bpf_map_lookup_elem(&rec_nat_scratch, &after);
	if (!rec)
		return 0;
	rec_begin(&rec->hdr, REC_NAT, j, ct->ct_net.net);
	if (after)
		rec->hdr.flags |= REC_F_NAT_AFTER;
	rec->manip = mtype;
	rec->dir = dir;
	read_pkt(&rec->pkt, skb, NULL);
	rec_send(rec, sizeof(*rec));
	return 0;
}

SEC("fentry/nf_nat_manip_pkt")
int BPF_PROG(nat_enter, struct sk_buff *skb, struct nf_conn *ct, u32 mtype,
	     u32 dir)
{
	return nat(skb, ct, mtype, dir, 0);
}

SEC("fexit/nf_nat_manip_pkt")
int BPF_PROG(nat_exit, struct sk_buff *skb, struct nf_conn *ct, u32 mtype,
	     u32 dir)
{
	return nat(skb, ct, mtype, dir, 1);
}

/* ---- legacy tables ---- */

/*
 * The two probes of a function, for each context: see enum context.
 */
#define TABLE_PROBES(name, func, fam, context)                                 \
	SEC("fentry/" #func)                                                   \
	int BPF_PROG(name##_enter, void *table, struct sk_buff *skb,           \
		     struct nf_hook_state *state)                              \
	{                                                                      \
		xt_enter(ctx, fam, context, table, skb, state);                \
		return 0;                                                      \
	}                                                                      \
	SEC("fexit/" #func)                                                    \
	int BPF_PROG(name##_exit, void *table, struct sk_buff *skb,            \
		     struct nf_hook_state *state, unsigned int verdict)        \
	{                                                                      \
		xt_exit(ctx, fam, context, table, skb, state, verdict);        \
		return 0;                                                      \
	}

TABLE_PROBES(ipt_task, ipt_do_table, FAM_IP, CTX_TASK)
TABLE_PROBES(ipt_spare, ipt_do_table, FAM_IP, CTX_SPARE)
TABLE_PROBES(ipt_bh, ipt_do_table, FAM_IP, CTX_BH)
TABLE_PROBES(ip6t_task, ip6t_do_table, FAM_IP6, CTX_TASK)
TABLE_PROBES(ip6t_spare, ip6t_do_table, FAM_IP6, CTX_SPARE)
TABLE_PROBES(ip6t_bh, ip6t_do_table, FAM_IP6, CTX_BH)

/* The table at this address is no more; the next one there is another. */
SEC("fentry/xt_free_table_info")
int BPF_PROG(table_free, struct xt_table_info *info)
{
	u64 key = (u64)info;

	bpf_map_delete_elem(&xt_tables, &key);
	return 0;
}

/*
 * Which table does nftrace itself read with IPT_SO_GET_ENTRIES? The function
 * returns with the table's mutex held, and the copy is made under it: what is
 * noted here is the very table that user space gets.
 */
struct lookup last_lookup = {};

SEC("fexit/xt_find_table_lock")
int BPF_PROG(table_lookup, struct net *net, u8 af, const char *name,
	     struct xt_table *table)
{
	struct xt_tab *tab;
	u64 info;

	if (bpf_get_current_pid_tgid() >> 32 != self_tgid)
		return 0;
	last_lookup.private = 0;
	last_lookup.gen = 0;
	/* ERR_PTR */
	if (!table || (u64)table >= (u64)-4095)
		return 0;
	info = (u64)BPF_CORE_READ(table, private);
	tab = tab_get(info, table, af == NFPROTO_IPV6 ? FAM_IP6 : FAM_IP,
		      SCRATCH_LOOKUP);
	last_lookup.private = info;
	if (tab)
		last_lookup.gen = tab->gen;
	return 0;
}

/* ---- at start ---- */

struct symbols {
	u64 per_cpu_offset, preempt_count, pcpu_hot, xt_recseq;
	u64 bpf_preempt_disable;
};

struct symbols found_symbols = {};

/* Run once by the loader: looks symbols up, far faster than /proc/kallsyms. */
SEC("syscall")
int find_symbols(void *ctx)
{
	struct symbols *f = &found_symbols;

	bpf_kallsyms_lookup_name("__per_cpu_offset", 17, 0, &f->per_cpu_offset);
	bpf_kallsyms_lookup_name("__preempt_count", 16, 0, &f->preempt_count);
	bpf_kallsyms_lookup_name("pcpu_hot", 9, 0, &f->pcpu_hot);
	bpf_kallsyms_lookup_name("xt_recseq", 10, 0, &f->xt_recseq);
	bpf_kallsyms_lookup_name("bpf_preempt_disable", 20, 0,
				 &f->bpf_preempt_disable);
	return 0;
}

/* So that bpf2go finds the types that no map holds. */
const struct rec_hook *unused_rec_hook __attribute__((unused));
const struct rec_table *unused_rec_table __attribute__((unused));
const struct rec_dev *unused_rec_dev __attribute__((unused));
const struct rec_nat *unused_rec_nat __attribute__((unused));
const struct rec_pkt *unused_rec_pkt __attribute__((unused));
const enum rec_type unused_rec_type __attribute__((unused)) = 0;
const enum rec_flag unused_rec_flag __attribute__((unused)) = 0;
const enum pkt_flag unused_pkt_flag __attribute__((unused)) = 0;
const enum loss unused_loss __attribute__((unused)) = 0;
