//go:build ignore
// SPDX-License-Identifier: GPL-2.0
/*
 * The probes. Each is a thin entry into a handler; what they have in common
 * stands in the headers: xt.h (rules of legacy tables), nft.h (nf_tables), filter.h (which
 * packets), packet.h (what is recorded of them), compat.h (how kernels differ).
 *
 * Every probe begins with what it costs all packets of the host that nobody follows:
 * a look at live, and at open_frames.
 */
#include "kernel.h"
#include "event.h"
#include "maps.h"
#include "compat.h"
#include "packet.h"
#include "filter.h"
#include "xt.h"
#include "nft.h"

char _license[] SEC("license") = "GPL";

/* ---- journeys: from the first hook to the end of the skb ---- */

static __always_inline struct journey *
journey_begin(struct where *w, struct sk_buff *skb, const struct decision *d)
{
	u64 key = (u64)skb;
	struct journey new = {};

	/* Two packets of one CPU never begin in the same nanosecond. */
	new.id = w->now << 8 | (w->cpu & 0xff);
	if (d->match == MATCH_MAYBE)
		new.flags = JOURNEY_TENTATIVE;
	new.flow = d->flow;
	if (bpf_map_update_elem(&journeys, &key, &new, BPF_NOEXIST)) {
		count_loss(LOSS_JOURNEYS);
		return NULL;
	}
	__sync_fetch_and_add(&live, 1);
	return bpf_map_lookup_elem(&journeys, &key);
}

static __always_inline void journey_forget(struct sk_buff *skb,
					   struct journey *j)
{
	u64 key = (u64)skb;

	if (j->flags & JOURNEY_TENTATIVE)
		leave_alone(j->flow);
	if (!bpf_map_delete_elem(&journeys, &key))
		__sync_fetch_and_add(&live, -1);
}

/* Where a probe of nf_hook_slow runs: softirqs and tasks have their own space to work in. */
static __always_inline bool where_at_hook(struct where *w)
{
	if (!where_am_i(w, ON_HOOK))
		return false;
	if (use_task_probe && w->task)
		w->on = ON_HOOK_TASK;
	return true;
}

static __always_inline void hook(void *ctx, struct sk_buff *skb,
				 struct nf_hook_state *state)
{
	struct journey *j = journey_of(skb);
	struct decision *d;
	struct where w;
	u32 key = ON_HOOK;

	w.c = NULL;
	if (open_frames) {
		if (use_task_probe && j && same_call((u64)ctx, state, j))
			return;
		if (!where_at_hook(&w))
			return;
		hook_next(&w, skb, j);
	}
	if (!j &&
	    (!tracing || seen_before(skb, state) || flow_passes(skb, state)))
		return;
	if (use_task_probe) {
		if (!w.c && !where_at_hook(&w))
			return;
		key = w.on;
	}
	d = bpf_map_lookup_elem(&decisions, &key);
	if (!d)
		return;
	d->first = 0;
	d->flags = 0;
	if (!j || j->flags & JOURNEY_TENTATIVE) {
		match(skb, state, d);
		if (!j) {
			if (d->match == MATCH_NO) {
				if (!use_nat || !use_detail)
					let_pass(skb, state->net, state->hook,
						 state->pf);
				return;
			}
			if (!w.c && !where_at_hook(&w))
				return;
			j = journey_begin(&w, skb, d);
			if (!j)
				return;
			d->first = 1;
			d->flags = matched_late(skb, state) ? REC_F_LATE : 0;
		} else if (d->match == MATCH_YES) {
			j->flags &= ~JOURNEY_TENTATIVE;
		}
	}
	if (w.c || where_at_hook(&w))
		frame_open(&w, (u64)ctx, skb, state, j, d);
}

/*
 * net/netfilter/core.c:nf_hook_slow: every packet at every hook passes here.
 *
 * The kernel skips a program that is hit while it runs on the same CPU. Where tasks
 * preempt each other, or copying takes long (one CPU), this one is not attached: two that are
 * jump to it, one for tasks, which softirqs do not run into, and one for softirqs. Where
 * tasks preempt each other there are several copies of both, of which the first one that is
 * not skipped does the work.
 */
SEC("fentry/nf_hook_slow")
int BPF_PROG(hook_enter, struct sk_buff *skb, struct nf_hook_state *state)
{
	if (!use_task_probe && !live && passes(skb, state))
		return 0;
	if (tasks_preempt && bpf_preempt_disable)
		bpf_preempt_disable();
	hook(ctx, skb, state);
	if (tasks_preempt && bpf_preempt_disable)
		bpf_preempt_enable();
	return 0;
}

/* hook_enter, where it is not attached itself. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u32);
} hook_program SEC(".maps");

SEC("fentry/nf_hook_slow")
int BPF_PROG(hook_enter_task, struct sk_buff *skb, struct nf_hook_state *state)
{
	if (!live && passes(skb, state))
		return 0;
	if (!in_softirq(this_cpu()))
		bpf_tail_call(ctx, &hook_program, 0);
	return 0;
}

SEC("fentry/nf_hook_slow")
int BPF_PROG(hook_enter_softirq, struct sk_buff *skb,
	     struct nf_hook_state *state)
{
	if (!live && passes(skb, state))
		return 0;
	if (in_softirq(this_cpu()))
		bpf_tail_call(ctx, &hook_program, 0);
	return 0;
}

/*
 * The death of a packet, in net/core/skbuff.c. It does not come here after a socket has read
 * it; its journey has ended before (deliver).
 */
SEC("fentry/skb_release_head_state")
int BPF_PROG(skb_release, struct sk_buff *skb)
{
	struct journey *j = journey_of(skb);
	struct rec_hdr h;
	u64 now;

	if (!j)
		return 0;
	if (j->flags & JOURNEY_MORPH) {
		j->flags &= ~JOURNEY_MORPH;
		return 0;
	}
	now = hook_over(NULL, j, ON_RELEASE);
	rec_begin(&h, REC_END, j, NULL, now, bpf_get_smp_processor_id());
	journey_forget(skb, j);
	rec_send(&h, sizeof(h));
	return 0;
}

/*
 * nf_hook_slow itself drops a packet that a hook's verdict condemns. 5.10 gives no
 * reason. The journey ends here, and not only at the release that comes next: the kernel
 * may skip one of the two, but hardly both.
 */
SEC("tp_btf/kfree_skb")
int BPF_PROG(skb_drop, struct sk_buff *skb, void *location, u32 reason)
{
	struct journey *j = journey_of(skb);
	struct rec_hdr h;
	u64 now;
	u32 cpu;

	if (!j)
		return 0;
	cpu = bpf_get_smp_processor_id();
	now = hook_over(untrusted(skb), j, ON_DROP);
	if (reason == bpf_core_enum_value(enum skb_drop_reason,
					  SKB_DROP_REASON_NETFILTER_DROP)) {
		rec_begin(&h, REC_DROP, j, NULL, now, cpu);
		rec_send(&h, sizeof(h));
	}
	rec_begin(&h, REC_END, j, NULL, now, cpu);
	journey_forget(skb, j);
	rec_send(&h, sizeof(h));
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
	struct frame *f;

	if (!j)
		return 0;
	j->flags |= JOURNEY_MORPH;
	/* Behind the hook that it was in, the packet is another one. */
	f = frame_at(j->frame);
	if (f && f->jid == j->id && frame_evaluated(f))
		f->morphed = 1;
	return 0;
}

/*
 * net/ipv4/ip_fragment.c, net/ipv6/netfilter/nf_conntrack_reasm.c: the last fragment has become
 * the whole packet, before most tables of the hook see it.
 */
static __always_inline void defragmented(struct sk_buff *skb)
{
	struct journey *j = journey_of(skb);

	if (!j)
		return;
	frame_again(skb, j);
	if (nft_on)
		nft_again(skb, j);
}

SEC("fexit/ip_defrag")
int BPF_PROG(defrag_ip, struct net *net, struct sk_buff *skb, u32 user, int ret)
{
	if (!ret)
		defragmented(skb);
	return 0;
}

SEC("fexit/nf_ct_frag6_gather")
int BPF_PROG(defrag_ip6, struct net *net, struct sk_buff *skb, u32 user,
	     int ret)
{
	if (!ret)
		defragmented(skb);
	return 0;
}

/* ---- where the packet goes ---- */

static __always_inline void record_dev(struct sk_buff *skb, struct journey *j,
				       struct net_device *dev, u16 type,
				       enum on on)
{
	struct rec_dev rec;
	u64 now = hook_over(skb, j, on);

	if (j->flags & JOURNEY_TENTATIVE && dev && match_dev(skb, dev))
		j->flags &= ~JOURNEY_TENTATIVE;
	__builtin_memset(&rec, 0, sizeof(rec));
	rec_begin(&rec.hdr, type, j, dev ? dev->nd_net.net : NULL, now,
		  bpf_get_smp_processor_id());
	read_dev(&rec.dev, dev);
	rec_send(&rec, sizeof(rec));
}

/* In __dev_queue_xmit, net/core/dev.c. */
SEC("tp_btf/net_dev_queue")
int BPF_PROG(dev_xmit, struct sk_buff *skb)
{
	struct journey *j = journey_of(skb);

	if (!j)
		return 0;
	skb = untrusted(skb);
	record_dev(skb, j, skb->dev, REC_XMIT, ON_XMIT);
	return 0;
}

/* net/bridge/br_forward.c: br_forward and the flooding functions end here. */
SEC("fentry/__br_forward")
int BPF_PROG(br_forward, struct net_bridge_port *to, struct sk_buff *skb)
{
	struct journey *j = journey_of(skb);

	if (j)
		record_dev(skb, j, to->dev, REC_BRIDGE, ON_BRIDGE);
	return 0;
}

static __always_inline int deliver(struct sk_buff *skb, enum on on)
{
	struct journey *j = journey_of(skb);

	if (!j)
		return 0;
	record_dev(skb, j, skb->dev, REC_DELIVER, on);
	journey_forget(skb, j);
	return 0;
}

SEC("fentry/ip_local_deliver_finish")
int BPF_PROG(deliver_ip, struct net *net, struct sock *sk, struct sk_buff *skb)
{
	return deliver(skb, ON_DELIVER);
}

SEC("fentry/ip6_input_finish")
int BPF_PROG(deliver_ip6, struct net *net, struct sock *sk, struct sk_buff *skb)
{
	return deliver(skb, ON_DELIVER6);
}

/* ---- NAT ---- */

/* The packet is rewritten within a hook: what was before is a part of its own. */
static __always_inline int rewrite(struct sk_buff *skb, struct nf_conn *ct,
				   u32 mtype, u32 dir)
{
	struct journey *j = journey_of(skb);
	struct rec_nat rec = {};
	struct where w;

	if (!j || !frame_split(&w, skb, j, ON_NAT))
		return 0;
	rec_begin(&rec.hdr, REC_NAT, j, ct->ct_net.net, w.now, w.cpu);
	rec.manip = mtype;
	rec.dir = dir;
	rec_send(&rec, sizeof(rec));
	return 0;
}

SEC("fentry/nf_nat_manip_pkt")
int BPF_PROG(nat, struct sk_buff *skb, struct nf_conn *ct, u32 mtype, u32 dir)
{
	return rewrite(skb, ct, mtype, dir);
}

/* include/net/netfilter/nf_nat.h:HOOK2MANIP, ip_conntrack_common.h:CTINFO2DIR */
static __always_inline int
rewrite_error(struct sk_buff *skb, struct nf_conn *ct, u32 ctinfo, u32 hook)
{
	return rewrite(skb, ct,
		       hook != NF_INET_POST_ROUTING && hook != NF_INET_LOCAL_IN,
		       ctinfo >= IP_CT_IS_REPLY);
}

/* ICMP errors are rewritten with the packet that they quote, and not by nf_nat_manip_pkt. */
SEC("fentry/nf_nat_icmp_reply_translation")
int BPF_PROG(nat_icmp, struct sk_buff *skb, struct nf_conn *ct, u32 ctinfo,
	     u32 hooknum)
{
	return rewrite_error(skb, ct, ctinfo, hooknum);
}

SEC("fentry/nf_nat_icmpv6_reply_translation")
int BPF_PROG(nat_icmp6, struct sk_buff *skb, struct nf_conn *ct, u32 ctinfo,
	     u32 hooknum)
{
	return rewrite_error(skb, ct, ctinfo, hooknum);
}

/* ---- who else gets the CPU ---- */

/* kernel/softirq.c: what a softirq's packets were in is over. */
SEC("tp_btf/softirq_exit")
int BPF_PROG(softirq_exit)
{
	struct where w;

	if (!open_frames || !where_am_i(&w, ON_SOFTIRQ))
		return 0;
	frame_stop(&w);
	w.task = 0;
	frames_pop(&w, ~0ULL);
	w.task = bpf_get_current_task();
	frame_resume(&w);
	return 0;
}

/* kernel/sched/core.c */
SEC("tp_btf/sched_switch")
int BPF_PROG(sched_switch, bool preempt, struct task_struct *prev,
	     struct task_struct *next)
{
	struct where w;

	if (!open_task_frames || !where_am_i(&w, ON_SWITCH))
		return 0;
	frame_stop(&w);
	w.task = (u64)next;
	frame_resume(&w);
	return 0;
}

/* ---- rulesets ---- */

/* The table at this address is no more; the next one there is another. */
SEC("fentry/xt_free_table_info")
int BPF_PROG(table_free, void *info)
{
	u64 key = (u64)info;

	if (!bpf_map_delete_elem(&xt_tables, &key))
		__sync_fetch_and_add(&xt_frees, 1);
	return 0;
}

/*
 * Tables that were replaced. Each is to be read before the next replaces it, whatever else
 * user space has to do: so it is told here, and not among the records.
 */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 16);
} new_tables SEC(".maps");

/* The table's mutex is held: nobody replaces it again before this returns. */
SEC("fexit/xt_replace_table")
int BPF_PROG(table_replaced, struct xt_table *table, u32 num_counters,
	     void *info, int *error, void *old)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	u64 private = (u64)info;
	struct new_table news = {};
	struct xt_tab *tab;

	if (!old || !xt.on)
		return 0;
	news.pf = table->af;
	tab = bpf_map_lookup_elem(&xt_tables, &private);
	if (!tab)
		tab = tab_make(private, news.pf, ON_REPLACE);
	if (!tab)
		return 0;
	news.private = private;
	news.gen = tab->gen;
	news.netns = BPF_CORE_READ(task, nsproxy, net_ns, ns.inum);
	bpf_probe_read_kernel(news.name, sizeof(news.name), table->name);
	bpf_ringbuf_output(&new_tables, &news, sizeof(news),
			   BPF_RB_FORCE_WAKEUP);
	return 0;
}

/*
 * Which table does nftrace itself read with IPT_SO_GET_ENTRIES? The function
 * returns with the table's mutex held, and the copy is made under it: what is
 * noted here is the very table that user space gets.
 */
struct lookup last_lookup = {};

/* nftrace's own process, as the initial PID namespace numbers it. */
u32 self_tgid = 0;

SEC("fexit/xt_find_table_lock")
int BPF_PROG(table_lookup, struct net *net, u8 af, const char *name, u64 table)
{
	struct xt_table_head h;
	struct xt_tab *tab;

	if (bpf_get_current_pid_tgid() >> 32 != self_tgid)
		return 0;
	last_lookup.private = 0;
	last_lookup.gen = 0;
	/* ERR_PTR */
	if (!table || table >= (u64)-4095 ||
	    bpf_probe_read_kernel(&h, sizeof(h), (void *)table))
		return 0;
	tab = bpf_map_lookup_elem(&xt_tables, &h.private);
	if (!tab)
		tab = tab_make(h.private, af, ON_LOOKUP);
	last_lookup.private = h.private;
	if (tab)
		last_lookup.gen = tab->gen;
	return 0;
}

/* ---- nf_tables ---- */

/* net/netfilter/nf_tables_core.c: see nft.h. Where info->trace is 0, the rest is not set. */
SEC("fentry/__nft_trace_packet")
int BPF_PROG(nft_trace, const struct nft_pktinfo *pkt,
	     const struct nft_verdict *verdict, const struct nft_rule_dp *rule,
	     struct nft_traceinfo *info, u32 type)
{
	if (!live || !info->trace)
		return 0;
	return nft_did(untrusted(pkt->skb), info->basechain, verdict, rule,
		       NULL, type);
}

/* The same where all that stands in info. */
SEC("fentry/__nft_trace_packet")
int BPF_PROG(nft_trace_info, struct nft_traceinfo___6_3 *info,
	     const struct nft_chain *chain, u32 type)
{
	if (!live || !info->trace)
		return 0;
	return nft_did(untrusted(info->pkt->skb), info->basechain,
		       info->verdict, info->rule, chain, type);
}

/*
 * net/netfilter/nf_tables_api.c: nobody else changes anything until this is over, and nothing is
 * changed yet.
 */
SEC("fentry/nf_tables_commit")
int BPF_PROG(nft_commit, struct net *net)
{
	u32 netns = net->ns.inum;
	struct nft_gen *had = bpf_map_lookup_elem(&nft_gens, &netns);

	if (!had)
		return 0;
	had->parity = nft_parity(net, nft_generation(net, nft_net_id));
	had->sure = 1;
	return 0;
}

/*
 * There is a new generation of a namespace's rulesets, to be read before the next one if packets
 * are followed there.
 */
SEC("fexit/nf_tables_commit")
int BPF_PROG(nft_committed, struct net *net)
{
	struct new_table news = {};

	news.netns = net->ns.inum;
	if (!bpf_map_lookup_elem(&nft_gens, &news.netns))
		return 0;
	news.gen = nft_generation(net, nft_net_id);
	bpf_ringbuf_output(&new_tables, &news, sizeof(news),
			   BPF_RB_FORCE_WAKEUP);
	return 0;
}

/* ---- at start ---- */

struct symbols {
	u64 per_cpu_offset, preempt_count, pcpu_hot;
	u64 xt_recseq, xt_pernet_id; /* of module x_tables */
	u64 nft_net_id;		     /* nf_tables_net_id, of module nf_tables */
	u32 pernet_id;		     /* what xt_pernet_id holds */
	u32 nft_id;		     /* what nf_tables_net_id holds */
};

struct symbols found_symbols = {};

/*
 * Run by the loader: looks symbols up, far faster than /proc/kallsyms. Who the loader is, it
 * cannot know itself in a PID namespace.
 */
SEC("syscall")
int find_symbols(void *ctx)
{
	struct symbols *f = &found_symbols;

	self_tgid = bpf_get_current_pid_tgid() >> 32;
	bpf_kallsyms_lookup_name("__per_cpu_offset", 17, 0, &f->per_cpu_offset);
	bpf_kallsyms_lookup_name("__preempt_count", 16, 0, &f->preempt_count);
	bpf_kallsyms_lookup_name("pcpu_hot", 9, 0, &f->pcpu_hot);
	bpf_kallsyms_lookup_name("xt_recseq", 10, 0, &f->xt_recseq);
	bpf_kallsyms_lookup_name("xt_pernet_id", 13, 0, &f->xt_pernet_id);
	if (f->xt_pernet_id)
		bpf_probe_read_kernel(&f->pernet_id, sizeof(f->pernet_id),
				      (void *)f->xt_pernet_id);
	bpf_kallsyms_lookup_name("nf_tables_net_id", 17, 0, &f->nft_net_id);
	if (f->nft_net_id)
		bpf_probe_read_kernel(&f->nft_id, sizeof(f->nft_id),
				      (void *)f->nft_net_id);
	return 0;
}

/* Of the namespace of whoever runs nft_state: 1 + whether rules may be about to change. */
u32 nft_busy = 0;

/*
 * Run by the loader, in a namespace: whether its generation has a number already, and its rules
 * are not yet in force. That is not so if nobody holds the lock of transactions, nor before their
 * commit.
 */
SEC("syscall")
int nft_state(void *ctx)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct net *net = BPF_CORE_READ(task, nsproxy, net_ns);
	u32 netns = BPF_CORE_READ(net, ns.inum), gen;
	struct nft_gen *had;
	u64 pernet, owner = 0;

	pernet = read_u64((u64)BPF_CORE_READ(net, gen) + 8UL * nft_net_id);
	if (bpf_probe_read_kernel(&owner, sizeof(owner),
				  (void *)(pernet + nft_lock)))
		return 1;
	nft_busy = 1 + !!owner;
	had = bpf_map_lookup_elem(&nft_gens, &netns);
	if (!owner || !had || !had->sure)
		return 0;
	if (bpf_core_field_exists(net->nft.base_seq))
		gen = BPF_CORE_READ(net, nft.base_seq);
	else
		gen = read_u32(pernet + nft_seq);
	if (nft_parity(net, gen) == had->parity)
		nft_busy = 1;
	return 0;
}

/* So that bpf2go finds the types that no map holds. */
const struct rec_hook *unused_rec_hook __attribute__((unused));
const struct rec_dev *unused_rec_dev __attribute__((unused));
const struct rec_nat *unused_rec_nat __attribute__((unused));
const struct new_table *unused_new_table __attribute__((unused));
const struct rec_nft *unused_rec_nft __attribute__((unused));
const enum nft_what unused_nft_what __attribute__((unused)) = 0;
const struct rec_pkt *unused_rec_pkt __attribute__((unused));
const enum rec_type unused_rec_type __attribute__((unused)) = 0;
const enum rec_flag unused_rec_flag __attribute__((unused)) = 0;
const enum pkt_flag unused_pkt_flag __attribute__((unused)) = 0;
const enum loss unused_loss __attribute__((unused)) = 0;
const enum limits unused_limits __attribute__((unused)) = 0;
const struct xt_table_head *unused_head __attribute__((unused));
