//go:build ignore
// SPDX-License-Identifier: GPL-2.0
/*
 * The probes. Each is a thin entry into a handler; what they have in common
 * stands in the headers: xt.h (rules of legacy tables), nft.h (nf_tables), eb.h (ebtables),
 * flow.h (flowtables),
 * filter.h (which packets), packet.h (what is recorded of them), compat.h (how kernels differ).
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
#include "kprobe.h"
#include "flow.h"
#include "eb.h"

char _license[] SEC("license") = "GPL";

/* ---- journeys: from the first hook to the end of the skb ---- */

static __always_inline struct journey *
journey_begin(struct where *w, struct sk_buff *skb, const struct decision *d)
{
	u64 key = (u64)skb;
	struct journey new = {};

	/* Two packets of one CPU never begin in the same nanosecond. */
	new.id = w->now << 8 | (w->cpu & 0xff);
	if (d->match != MATCH_YES)
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

	if (j->flags & JOURNEY_TENTATIVE && j->flow)
		leave_alone(j->flow);
	if (!bpf_map_delete_elem(&journeys, &key))
		__sync_fetch_and_add(&live, -1);
}

/*
 * Whether a packet that is followed from a bridge's port on (port_in) leaves the kernel without having
 * met a hook: nobody needs to know of it.
 */
static __always_inline bool met_no_hook(struct sk_buff *skb, struct journey *j)
{
	if (j->seq || j->frame)
		return false;
	journey_forget(skb, j);
	return true;
}

/* Where a probe of nf_hook_slow runs: softirqs and tasks have their own space to work in. */
static __always_inline bool where_at_hook(struct where *w, const enum on on)
{
	if (!where_am_i(w, on))
		return false;
	if (on == ON_HOOK && hook_copies > 1 && w->task)
		w->on = ON_HOOK_TASK;
	return true;
}

/* Loaded at each use: with a variable the verifier would follow each value that it may have. */
static __always_inline u8 hook_of(struct nf_hook_state *state, const enum on on)
{
	return on == ON_HOOK_BRIDGE ? NF_INET_PRE_ROUTING : get(state, hook);
}

/*
 * A packet enters a hook. sp names the call. on is ON_HOOK, or
 *
 *  - ON_HOOK_BRIDGE at the bridge's own PREROUTING: nothing that a softirq may interrupt, and
 *    nowhere that the packet was before;
 *  - ON_REINJECT where what is left of the hook runs behind a queue.
 */
static __always_inline void hook(u64 sp, struct sk_buff *skb,
				 struct nf_hook_state *state, const enum on on)
{
	struct journey *j = journey_of(skb);
	struct decision *d;
	struct where w;
	u32 key = on;

	w.c = NULL;
	if (open_frames) {
		if (on == ON_HOOK && hook_copies > 1 && j &&
		    same_call(sp, state, j))
			return;
		if (!where_at_hook(&w, on))
			return;
		hook_next(&w, skb, j);
	}
	/* What a followed packet's rules send is followed, too, so as to know when it has gone. */
	if (!j &&
	    (!tracing || (on == ON_HOOK && seen_before(skb, state)) ||
	     flow_passes(skb, state, hook_of(state, on))) &&
	    !within_frame(&w, sp))
		return;
	if (on == ON_HOOK && hook_copies > 1) {
		if (!w.c && !where_at_hook(&w, on))
			return;
		key = w.on;
	}
	d = bpf_map_lookup_elem(&decisions, &key);
	if (!d)
		return;
	d->first = j ? !nonzero(j->seq) : 0;
	d->flags = on == ON_REINJECT ? REC_F_REINJECTED : 0;
	if (!j || j->flags & JOURNEY_TENTATIVE) {
		match(skb, state, hook_of(state, on), d);
		if (!j) {
			if (d->match == MATCH_NO && !within_frame(&w, sp)) {
				if (!use_later || !use_detail)
					let_pass(skb, get(state, net),
						 hook_of(state, on),
						 get(state, pf));
				return;
			}
			if (!w.c && !where_at_hook(&w, on))
				return;
			j = journey_begin(&w, skb, d);
			if (!j)
				return;
			d->first = 1;
			if ((on == ON_REINJECT && use_filter) ||
			    (on == ON_HOOK && matched_late(skb, state)))
				d->flags |= REC_F_LATE;
		} else if (d->match == MATCH_YES) {
			j->flags &= ~JOURNEY_TENTATIVE;
		}
	}
#ifndef NFTRACE_KPROBE
	/* A softirq sees all kprobes or none: here none, until its end. */
	if (some_kprobes && blind()) {
		count_loss(LOSS_SKIPPED);
		d->flags |= REC_F_NFTMISSED;
	}
#endif
	if (on == ON_REINJECT)
		j->queued = 0;
	else
		left_queue(j);
	if (w.c || where_at_hook(&w, on))
		frame_open(&w, sp, skb, state, hook_of(state, on), j, d,
			   on != ON_HOOK_BRIDGE);
}

#ifndef NFTRACE_KPROBE
/* hook_enter, where it is not attached itself. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u32);
} hook_program SEC(".maps");
#endif

/*
 * From "bpf, x86: Support private stack in jit" (6.13) on, the kernel gives a program one stack
 * for each CPU, for it skips what would use it twice. But what is jumped to is not skipped: a
 * softirq would overwrite the variables of the task that it interrupts, and the kernel falls. A
 * program with a tail call in it, even if it is never reached, gets no such stack.
 */
static __always_inline void without_private_stack(void *ctx)
{
#ifndef NFTRACE_KPROBE
	if (!hook_copies)
		bpf_tail_call(ctx, &hook_program, 0);
#endif
}

/*
 * Which CPU has a task in hook_enter, where it cannot be kept from being preempted there: what a
 * probe of a task works in is the CPU's. Another task that comes meanwhile has to pass. Resized at
 * load.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u8);
} hook_taken SEC(".maps");

#define shares_hook (tasks_preempt && !has_preempt_disable)

static __always_inline bool take_hook(u64 sp, u32 cpu, struct sk_buff *skb,
				      struct nf_hook_state *state)
{
	struct journey *j;
	u8 yes = 1;

	if (!bpf_map_update_elem(&hook_taken, &cpu, &yes, BPF_NOEXIST))
		return true;
	j = journey_of(skb);
	/* An earlier copy may have been here. */
	if (j && open_frames && same_call(sp, state, j))
		return false;
	count_loss(LOSS_SKIPPED);
	if (j)
		j->seq++; /* a hole in the path */
	return false;
}

/* hook(), and no other task on this CPU meanwhile. */
static __always_inline void hook_alone(u64 sp, struct sk_buff *skb,
				       struct nf_hook_state *state,
				       const enum on on)
{
	u32 cpu;

	if (tasks_preempt && has_preempt_disable)
		bpf_preempt_disable();
	if (shares_hook && !in_softirq(this_cpu())) {
		cpu = bpf_get_smp_processor_id();
		if (!take_hook(sp, cpu, skb, state))
			return;
	}
	hook(sp, skb, state, on);
	if (shares_hook && !in_softirq(this_cpu())) {
		cpu = bpf_get_smp_processor_id();
		bpf_map_delete_elem(&hook_taken, &cpu);
	}
	if (tasks_preempt && has_preempt_disable)
		bpf_preempt_enable();
}

/*
 * net/netfilter/core.c:nf_hook_slow: every packet at every hook passes here.
 *
 * The kernel skips a program that is hit while it runs on the same CPU. Where tasks
 * preempt each other, or copying takes long (one CPU), this one is not attached: copies are that
 * jump to it, of which the first one that is not skipped does the work. What interrupts it, or
 * preempts its task, meets the next one.
 */
SEC(ENTRY "nf_hook_slow")
int BPF_ENTRY(hook_enter, struct sk_buff *skb, struct nf_hook_state *state)
{
	without_private_stack(ctx);
	if (hook_copies == 1 && !live && passes(skb, state))
		return 0;
	hook_alone(sp_of(ctx), skb, state, ON_HOOK);
	return 0;
}

#ifndef NFTRACE_KPROBE
static __always_inline int hook_copy(void *ctx, struct sk_buff *skb,
				     struct nf_hook_state *state, const u32 nth)
{
	if (seen_call(sp_of(ctx), nth) ||
	    (nth == 1 && !live && passes(skb, state)))
		return 0;
	bpf_tail_call(ctx, &hook_program, 0);
	return 0;
}

#define HOOK_COPY(nth)                                                         \
	SEC(ENTRY "nf_hook_slow")                                              \
	int BPF_ENTRY(hook_enter_##nth, struct sk_buff *skb,                   \
		      struct nf_hook_state *state)                             \
	{                                                                      \
		return hook_copy(ctx, skb, state, nth);                        \
	}

HOOK_COPY(1)
HOOK_COPY(2)
HOOK_COPY(3)
HOOK_COPY(4)
HOOK_COPY(5)

#endif

/*
 * The death of a packet, in net/core/skbuff.c. It does not come here after a socket has read
 * it; its journey has ended before (deliver).
 */
SEC(ENTRY "skb_release_head_state")
int BPF_ENTRY(skb_release, struct sk_buff *skb)
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
	if (met_no_hook(skb, j))
		return 0;
	now = hook_over(NULL, j, only_on(ON_RELEASE));
	rec_begin(&h, REC_END, j, NULL, now, bpf_get_smp_processor_id());
	journey_forget(skb, j);
	rec_send(&h, sizeof(h));
	return 0;
}

/*
 * Its death in GRO, which has put its data to another packet and takes what is left for the next
 * one: net/core/skbuff.c, in older kernels dev.c. A hook that it is in still has not been seen to
 * end, and nobody knows what is of it: a hole in the path.
 */
SEC(ENTRY "napi_skb_free_stolen_head")
int BPF_ENTRY(skb_merged, struct sk_buff *skb)
{
	struct journey *j = journey_of(skb);
	struct rec_hdr h;

	if (!j || met_no_hook(skb, j))
		return 0;
	j->seq += nonzero(j->frame);
	rec_begin(&h, REC_END, j, NULL, bpf_ktime_get_ns(),
		  bpf_get_smp_processor_id());
	journey_forget(skb, j);
	rec_send(&h, sizeof(h));
	return 0;
}

/*
 * nf_hook_slow itself drops a packet that a hook's verdict condemns. The journey ends here, and
 * not only at the release that comes next: the kernel may skip one of the two, but hardly both.
 */
SEC(TRACEPOINT "kfree_skb")
int BPF_PROG(skb_drop, struct sk_buff *skb, u64 location)
{
	struct journey *j = journey_of(skb);
	struct rec_hdr h;
	u64 now;
	u32 cpu;

	if (!j || met_no_hook(skb, j))
		return 0;
	cpu = bpf_get_smp_processor_id();
	now = hook_over(untrusted(skb), j, only_on(ON_DROP));
	if (hook_dropped(location, ctx)) {
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
SEC(ENTRY "skb_morph")
int BPF_ENTRY(skb_morph, struct sk_buff *dst)
{
	struct journey *j = journey_of(dst);
	struct frame *f;

	if (!j)
		return 0;
	j->flags |= JOURNEY_MORPH;
	/* Behind the hook that it was in, the packet is another one. */
	f = frame_of(j);
	if (f && frame_evaluated(f))
		f->morphed = 1;
	return 0;
}

/*
 * net/ipv4/ip_fragment.c, net/ipv6/netfilter/nf_conntrack_reasm.c: the last fragment has become
 * the whole packet, before most tables of the hook see it.
 */
static __always_inline int defragmented(struct sk_buff *skb, int ret,
					enum on on)
{
	struct journey *j = ret ? NULL : journey_of(skb);

	if (!j)
		return 0;
	frame_again(skb, j);
	if (nft_on)
		nft_again(skb, j, on);
	return 0;
}

/* ---- where the packet goes ---- */

static __always_inline void record_dev(struct sk_buff *skb, struct journey *j,
				       struct net_device *dev, u16 type,
				       enum on on)
{
	struct rec_dev rec;
	u64 now;

	if (met_no_hook(skb, j))
		return;
	now = hook_over(skb, j, on);
	left_queue(j);
	if (j->flags & JOURNEY_TENTATIVE && dev && match_dev(skb, dev))
		j->flags &= ~JOURNEY_TENTATIVE;
	__builtin_memset(&rec, 0, sizeof(rec));
	rec_begin(&rec.hdr, type, j, dev ? get(dev, nd_net.net) : NULL, now,
		  bpf_get_smp_processor_id());
	read_dev(&rec.dev, dev);
	rec_send(&rec, sizeof(rec));
}

/* In __dev_queue_xmit, net/core/dev.c. */
SEC(TRACEPOINT "net_dev_queue")
int BPF_PROG(dev_xmit, struct sk_buff *skb)
{
	struct journey *j = journey_of(skb);

#ifdef NFTRACE_KPROBE
	unseen(skb);
#endif
	if (!j)
		return 0;
	skb = untrusted(skb);
	if (nft_on)
		flow_took(j);
	record_dev(skb, j, get(skb, dev), REC_XMIT, only_on(ON_XMIT));
	return 0;
}

/* net/bridge/br_forward.c: br_forward and the flooding functions end here. */
SEC(ENTRY "__br_forward")
int BPF_ENTRY(br_forward, struct net_bridge_port *to, struct sk_buff *skb)
{
	struct journey *j = journey_of(skb);

	if (j)
		record_dev(skb, j, get(to, dev), REC_BRIDGE,
			   only_on(ON_BRIDGE));
	return 0;
}

/*
 * net/bridge/br_input.c:br_handle_frame_finish: what came in by a port of a bridge. Of what the host
 * takes from there, IP's hooks know the bridge alone. Attached where interfaces are asked for. What
 * br_netfilter has led through IP's PREROUTING is followed from there, or from the bridge's INPUT on.
 */
SEC(ENTRY "br_handle_frame_finish")
int BPF_ENTRY(port_in, struct net *net, struct sock *sk, struct sk_buff *skb)
{
	struct net_device *dev = get(skb, dev);
	struct journey *j = journey_of(skb);
	struct decision d = { .match = MATCH_YES };
	struct where w;

	if (!may_match_iface(dev) || !match_dev(skb, dev))
		return 0;
	if (j)
		j->flags &= ~JOURNEY_TENTATIVE;
	else if (tracing && !from_br_netfilter(skb) &&
		 where_am_i(&w, only_on(ON_PORT)))
		journey_begin(&w, skb, &d);
	return 0;
}

static __always_inline int deliver(struct sk_buff *skb, enum on on)
{
	struct journey *j = journey_of(skb);

	if (!j || met_no_hook(skb, j))
		return 0;
	record_dev(skb, j, get(skb, dev), REC_DELIVER, on);
	journey_forget(skb, j);
	return 0;
}

SEC(ENTRY "ip_local_deliver_finish")
int BPF_ENTRY(deliver_ip, struct net *net, struct sock *sk, struct sk_buff *skb)
{
	return deliver(skb, only_on(ON_DELIVER));
}

/*
 * net/ipv6/ip6_input.c: ip6_input_finish calls it, which some compilers have made a part of who calls
 * that: then a probe there sees few packets, or none.
 */
SEC(ENTRY "ip6_protocol_deliver_rcu")
int BPF_ENTRY(deliver_ip6, struct net *net, struct sk_buff *skb)
{
	return deliver(skb, only_on(ON_DELIVER6));
}

/* ---- NAT ---- */

/* The packet is rewritten within a hook: what was before is a part of its own. */
static __always_inline int rewrite(struct sk_buff *skb, struct nf_conn *ct,
				   u32 mtype, u32 dir, enum on on)
{
	struct journey *j = journey_of(skb);
	struct rec_nat rec = {};
	struct where w;

	if (!j || !frame_split(&w, skb, j, on))
		return 0;
	rec_begin(&rec.hdr, REC_NAT, j, get(ct, ct_net.net), w.now, w.cpu);
	rec.manip = mtype;
	rec.dir = dir;
	rec_send(&rec, sizeof(rec));
	return 0;
}

SEC(ENTRY "nf_nat_manip_pkt")
int BPF_ENTRY(nat, struct sk_buff *skb, struct nf_conn *ct, u32 mtype, u32 dir)
{
	return rewrite(skb, ct, mtype, dir, only_on(ON_NAT));
}

/* include/net/netfilter/nf_nat.h:HOOK2MANIP, ip_conntrack_common.h:CTINFO2DIR */
static __always_inline int rewrite_error(struct sk_buff *skb,
					 struct nf_conn *ct, u32 ctinfo,
					 u32 hook, enum on on)
{
	return rewrite(skb, ct,
		       hook != NF_INET_POST_ROUTING && hook != NF_INET_LOCAL_IN,
		       ctinfo >= IP_CT_IS_REPLY, on);
}

/* ICMP errors are rewritten with the packet that they quote, and not by nf_nat_manip_pkt. */
SEC(ENTRY "nf_nat_icmp_reply_translation")
int BPF_ENTRY(nat_icmp, struct sk_buff *skb, struct nf_conn *ct, u32 ctinfo,
	      u32 hooknum)
{
	return rewrite_error(skb, ct, ctinfo, hooknum, only_on(ON_NAT_ICMP));
}

SEC(ENTRY "nf_nat_icmpv6_reply_translation")
int BPF_ENTRY(nat_icmp6, struct sk_buff *skb, struct nf_conn *ct, u32 ctinfo,
	      u32 hooknum)
{
	return rewrite_error(skb, ct, ctinfo, hooknum, only_on(ON_NAT_ICMP6));
}

/* ---- queues, net/netfilter/nfnetlink_queue.c ---- */

/* Called by nf_queue, within the hook whose verdict it is. */
SEC(ENTRY "nfqnl_enqueue_packet")
int BPF_ENTRY(queue, struct nf_queue_entry *entry)
{
	struct sk_buff *skb = untrusted(get(entry, skb));
	struct journey *j = journey_of(skb);

	if (j)
		frame_queue(skb, j, only_on(ON_QUEUE));
	return 0;
}

static __always_inline int not_queued(struct nf_queue_entry *entry, int ret)
{
	struct sk_buff *skb;
	struct journey *j;

	/* Else it may be gone already. */
	if (ret >= 0)
		return 0;
	skb = untrusted(get(entry, skb));
	j = journey_of(skb);
	if (j)
		frame_refused(skb, j, only_on(ON_REFUSED));
	return 0;
}

/* Who reads the queue dropped it, or ended: no more of the hook runs. */
static __always_inline void refused(struct sk_buff *skb)
{
	struct journey *j = journey_of(skb);
	struct rec_hdr h;

	if (!j)
		return;
	rec_begin(&h, REC_DROP, j, NULL, bpf_ktime_get_ns(),
		  bpf_get_smp_processor_id());
	h.flags |= REC_F_REINJECTED;
	rec_send(&h, sizeof(h));
}

/*
 * A program that reads a queue has said what is to become of a packet. What is left of its hook
 * runs within this function, and not in nf_hook_slow.
 */
SEC(ENTRY "nfqnl_reinject")
int BPF_ENTRY(reinject, struct nf_queue_entry *entry, u32 verdict)
{
	struct sk_buff *skb = untrusted(get(entry, skb));

	if ((verdict & NF_VERDICT_MASK) == NF_DROP) {
		refused(skb);
		return 0;
	}
	hook_alone(sp_of(ctx), skb, &entry->state, only_on(ON_REINJECT));
	return 0;
}

/* ---- who else gets the CPU ---- */

/* kernel/softirq.c: what a softirq's packets were in is over. */
SEC(TRACEPOINT "softirq_exit")
int BPF_PROG(softirq_exit)
{
	struct where w;

	if (!open_frames || !where_am_i(&w, only_on(ON_SOFTIRQ)))
		return 0;
	frame_stop(&w);
	w.task = 0;
	frames_pop(&w, ~0ULL);
	w.task = bpf_get_current_task();
	frame_resume(&w);
	return 0;
}

/* kernel/sched/core.c */
SEC(TRACEPOINT "sched_switch")
int BPF_PROG(sched_switch, bool preempt, struct task_struct *prev,
	     struct task_struct *next)
{
	struct frame *f;
	struct where w;
	u32 n;

	if (!open_task_frames || !where_am_i(&w, only_on(ON_SWITCH)))
		return 0;
	frame_left(&w, frame_top(&w));
	frame_stop(&w);
	w.task = number(next);
	n = frame_top(&w);
	f = frame_at(n);
	if (f) {
		frame_came(&w, f);
		frame_start(&w, n);
	}
	return 0;
}

/* ---- rulesets ---- */

/* The table at this address is no more; the next one there is another. */
SEC(ENTRY "xt_free_table_info")
int BPF_ENTRY(table_free, void *info)
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
static __always_inline int replaced(struct xt_table *table, u64 private,
				    void *old)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct new_table news = {};
	struct xt_tab *tab;

	if (!old || !xt.on)
		return 0;
	news.pf = get(table, af);
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

static __always_inline int looked_up(u8 af, u64 table)
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

/*
 * net/netfilter/nf_tables_core.c: see nft.h. Where info->trace is 0, the rest is not set.
 *
 * There are copies of it where the kernel can keep the tasks that they run for from sharing
 * their space.
 */
SEC(ENTRY "__nft_trace_packet")
int BPF_ENTRY(nft_trace, const struct nft_pktinfo *pkt,
	      const struct nft_verdict *verdict, const struct nft_rule_dp *rule,
	      struct nft_traceinfo *info, u32 type)
{
	if (!live || !get(info, trace))
		return 0;
	if (tasks_preempt && has_preempt_disable)
		bpf_preempt_disable();
	nft_did(untrusted(get(pkt, skb)), get(info, basechain), verdict, rule,
		NULL, type);
	if (tasks_preempt && has_preempt_disable)
		bpf_preempt_enable();
	return 0;
}

/* The same where all that stands in info. */
SEC(ENTRY "__nft_trace_packet")
int BPF_ENTRY(nft_trace_info, struct nft_traceinfo___6_3 *info,
	      const struct nft_chain *chain, u32 type)
{
	const struct nft_pktinfo *pkt;

	if (!live || !get(info, trace))
		return 0;
	pkt = get(info, pkt);
	return nft_did(untrusted(get(pkt, skb)), get(info, basechain),
		       get(info, verdict), get(info, rule), chain, type);
}

/*
 * net/netfilter/nf_tables_api.c: nobody else changes anything until this is over, and nothing is
 * changed yet.
 */
SEC(ENTRY "nf_tables_commit")
int BPF_ENTRY(nft_commit, struct net *net)
{
	u32 netns = get(net, ns.inum);
	struct nft_gen *had = bpf_map_lookup_elem(&nft_gens, &netns);

	if (!had)
		return 0;
	had->parity = nft_parity(net, nft_generation(net));
	had->sure = 1;
	return 0;
}

/*
 * There is a new generation of a namespace's rulesets, to be read before the next one if packets
 * are followed there.
 */
static __always_inline int committed(struct net *net)
{
	struct new_table news = {};

	news.netns = get(net, ns.inum);
	if (!bpf_map_lookup_elem(&nft_gens, &news.netns))
		return 0;
	news.gen = nft_generation(net);
	bpf_ringbuf_output(&new_tables, &news, sizeof(news),
			   BPF_RB_FORCE_WAKEUP);
	return 0;
}

/* ---- flowtables ---- */

SEC(ENTRY "nf_flow_offload_ip_hook")
int BPF_ENTRY(flow_ip, void *flowtable, struct sk_buff *skb)
{
	return flow_enter(skb, flowtable);
}

SEC(ENTRY "nf_flow_offload_ipv6_hook")
int BPF_ENTRY(flow_ip6, void *flowtable, struct sk_buff *skb)
{
	return flow_enter(skb, flowtable);
}

/* ---- where functions return ---- */

#ifndef NFTRACE_KPROBE
SEC("fexit/ip_defrag")
int BPF_PROG(defrag_ip, struct net *net, struct sk_buff *skb, u32 user, int ret)
{
	return defragmented(skb, ret, only_on(ON_DEFRAG));
}

SEC("fexit/nf_ct_frag6_gather")
int BPF_PROG(defrag_ip6, struct net *net, struct sk_buff *skb, u32 user,
	     int ret)
{
	return defragmented(skb, ret, only_on(ON_DEFRAG6));
}

SEC("fexit/nfqnl_enqueue_packet")
int BPF_PROG(queue_refused, struct nf_queue_entry *entry, u32 queuenum, int ret)
{
	return not_queued(entry, ret);
}

SEC("fexit/xt_replace_table")
int BPF_PROG(table_replaced, struct xt_table *table, u32 num_counters,
	     void *info, int *error, void *old)
{
	return replaced(table, number(info), old);
}

SEC("fexit/xt_find_table_lock")
int BPF_PROG(table_lookup, struct net *net, u8 af, const char *name, u64 table)
{
	return looked_up(af, table);
}

SEC("fexit/nf_tables_commit")
int BPF_PROG(nft_committed, struct net *net)
{
	return committed(net);
}

SEC("fexit/nf_flow_offload_ip_hook")
int BPF_PROG(flow_ip_done, void *flowtable, struct sk_buff *skb,
	     struct nf_hook_state *state, u32 verdict)
{
	return flow_leave(skb, verdict);
}

SEC("fexit/nf_flow_offload_ipv6_hook")
int BPF_PROG(flow_ip6_done, void *flowtable, struct sk_buff *skb,
	     struct nf_hook_state *state, u32 verdict)
{
	return flow_leave(skb, verdict);
}
#else
SEC("kprobe/ip_defrag")
int BPF_KPROBE(defrag_ip_call, struct net *net, struct sk_buff *skb)
{
	return call_begins(CALL_DEFRAG, (u64)skb, 0);
}

SEC("kretprobe/ip_defrag")
int BPF_KRETPROBE(defrag_ip, int ret)
{
	struct call_args a;

	return call_ends(CALL_DEFRAG, &a) ?
		       defragmented((void *)a.a, ret, only_on(ON_DEFRAG)) :
		       0;
}

SEC("kprobe/nf_ct_frag6_gather")
int BPF_KPROBE(defrag_ip6_call, struct net *net, struct sk_buff *skb)
{
	return call_begins(CALL_DEFRAG6, (u64)skb, 0);
}

SEC("kretprobe/nf_ct_frag6_gather")
int BPF_KRETPROBE(defrag_ip6, int ret)
{
	struct call_args a;

	return call_ends(CALL_DEFRAG6, &a) ?
		       defragmented((void *)a.a, ret, only_on(ON_DEFRAG6)) :
		       0;
}

SEC("kprobe/nfqnl_enqueue_packet")
int BPF_KPROBE(queue_refused_call, struct nf_queue_entry *entry)
{
	return call_begins(CALL_QUEUE, (u64)entry, 0);
}

SEC("kretprobe/nfqnl_enqueue_packet")
int BPF_KRETPROBE(queue_refused, int ret)
{
	struct call_args a;

	return call_ends(CALL_QUEUE, &a) ? not_queued((void *)a.a, ret) : 0;
}

SEC("kprobe/xt_replace_table")
int BPF_KPROBE(table_replaced_call, struct xt_table *table, u32 num_counters,
	       void *info)
{
	return call_begins(CALL_REPLACE, (u64)table, (u64)info);
}

SEC("kretprobe/xt_replace_table")
int BPF_KRETPROBE(table_replaced, void *old)
{
	struct call_args a;

	return call_ends(CALL_REPLACE, &a) ? replaced((void *)a.a, a.b, old) :
					     0;
}

SEC("kprobe/xt_find_table_lock")
int BPF_KPROBE(table_lookup_call, struct net *net, u8 af)
{
	return call_begins(CALL_LOOKUP, af, 0);
}

SEC("kretprobe/xt_find_table_lock")
int BPF_KRETPROBE(table_lookup, u64 table)
{
	struct call_args a;

	return call_ends(CALL_LOOKUP, &a) ? looked_up(a.a, table) : 0;
}

SEC("kprobe/nf_tables_commit")
int BPF_KPROBE(nft_committed_call, struct net *net)
{
	return call_begins(CALL_COMMIT, (u64)net, 0);
}

SEC("kretprobe/nf_tables_commit")
int BPF_KRETPROBE(nft_committed)
{
	struct call_args a;

	return call_ends(CALL_COMMIT, &a) ? committed((void *)a.a) : 0;
}

SEC("kprobe/nf_flow_offload_ip_hook")
int BPF_KPROBE(flow_ip_done_call, void *flowtable, struct sk_buff *skb)
{
	return call_begins(CALL_FLOW, (u64)skb, 0);
}

SEC("kretprobe/nf_flow_offload_ip_hook")
int BPF_KRETPROBE(flow_ip_done, u32 verdict)
{
	struct call_args a;

	return call_ends(CALL_FLOW, &a) ? flow_leave((void *)a.a, verdict) : 0;
}

SEC("kprobe/nf_flow_offload_ipv6_hook")
int BPF_KPROBE(flow_ip6_done_call, void *flowtable, struct sk_buff *skb)
{
	return call_begins(CALL_FLOW6, (u64)skb, 0);
}

SEC("kretprobe/nf_flow_offload_ipv6_hook")
int BPF_KRETPROBE(flow_ip6_done, u32 verdict)
{
	struct call_args a;

	return call_ends(CALL_FLOW6, &a) ? flow_leave((void *)a.a, verdict) : 0;
}

/* In __netif_receive_skb_core, net/core/dev.c: all that a softirq receives comes here. */
SEC(TRACEPOINT "netif_receive_skb")
int BPF_PROG(receive, struct sk_buff *skb)
{
	unseen(skb);
	return 0;
}
#endif

/* ---- bridges ---- */

/*
 * net/bridge/br_input.c:nf_hook_bridge_pre runs the bridge's own PREROUTING itself: the frame
 * begins where the first ruleset does. What br_netfilter brings back from IP's PREROUTING is in
 * nf_hook_slow again.
 */
static __always_inline void bridge_pre(struct sk_buff *skb,
				       struct nf_hook_state *state)
{
	struct net_device *in;
	struct journey *j;
	struct frame *f;
	u8 at = get(state, hook);

	if (at != NF_INET_PRE_ROUTING && at != NF_BR_BROUTING)
		return;
	if (!live && (!tracing || flow_passes(skb, state, NF_INET_PRE_ROUTING)))
		return;
	j = journey_of(skb);
	f = j ? frame_of(j) : NULL;
	in = get(state, in);
	/* It may have come to another bridge since. */
	if (f && f->rec.place.pf == NFPROTO_BRIDGE &&
	    f->rec.place.hook == NF_INET_PRE_ROUTING && in &&
	    f->rec.place.in.ifindex == get(in, ifindex))
		return;
	if ((!j && from_br_netfilter(skb)) || !bh_off(this_cpu()))
		return;
	/* The state is the hook's own, further up in the stack. */
	hook((u64)state, skb, state, ON_HOOK_BRIDGE);
}

/* net/netfilter/nft_chain_filter.c: before each base chain of family bridge. */
SEC(ENTRY "nft_do_chain_bridge")
int BPF_ENTRY(nft_bridge, void *priv, struct sk_buff *skb,
	      struct nf_hook_state *state)
{
	bridge_pre(skb, state);
	return 0;
}

/* ---- ebtables ---- */

static __always_inline int ebt_begins(u64 sp, u64 table, struct sk_buff *skb,
				      struct nf_hook_state *state)
{
	bridge_pre(skb, state);
#ifdef NFTRACE_KPROBE
	if (journey_of(skb))
		ebt_call_begins(sp, CALL_EBT, table, (u64)skb, (u64)state);
#endif
	return ebt_enter((u64)state, table, skb);
}

/* See compat.h for its arguments. */
SEC(ENTRY "ebt_do_table")
int BPF_ENTRY(ebt_begin, u64 table, struct sk_buff *skb,
	      struct nf_hook_state *state)
{
	return ebt_begins(sp_of(ctx), table, skb, state);
}

/* A table is about to be, and whatever else was at its address is no more. */
SEC(ENTRY "do_replace_finish")
int BPF_ENTRY(ebt_replace, struct net *net, struct ebt_replace *repl,
	      void *info)
{
	u64 private = (u64)info;

	bpf_map_delete_elem(&ebt_tables, &private);
#ifdef NFTRACE_KPROBE
	ebt_call_begins(sp_of(ctx), CALL_EBT_REPLACE, (u64)net, (u64)repl,
			private);
#endif
	return 0;
}

/* The table at this address is no more. */
SEC(ENTRY "__ebt_unregister_table")
int BPF_ENTRY(ebt_unregister, struct net *net, u64 table)
{
	u64 private = ebt_private(table);

	bpf_map_delete_elem(&ebt_tables, &private);
	return 0;
}

static __always_inline int ebt_table_replaced(struct net *net,
					      struct ebt_replace *repl,
					      u64 private, int ret)
{
	struct new_table news = {};

	if (ret)
		return 0;
	news.private = private;
	news.netns = get(net, ns.inum);
	news.pf = NFPROTO_BRIDGE;
	bpf_probe_read_kernel(news.name, sizeof(news.name), repl->name);
	bpf_ringbuf_output(&new_tables, &news, sizeof(news),
			   BPF_RB_FORCE_WAKEUP);
	return 0;
}

/* Which table nftrace itself reads: ebt_mutex is held, nobody replaces it meanwhile. */
SEC(ENTRY "copy_everything_to_user")
int BPF_ENTRY(ebt_lookup, u64 table)
{
	if (bpf_get_current_pid_tgid() >> 32 != self_tgid)
		return 0;
	last_lookup.private = ebt_private(table);
	last_lookup.gen = ebt_gen(table, last_lookup.private);
	return 0;
}

/* Counters are set, whoever counts meanwhile. */
SEC(ENTRY "do_ebt_set_ctl")
int BPF_ENTRY(ebt_set, struct sock *sk, int cmd)
{
	if (cmd != EBT_SO_SET_COUNTERS)
		return 0;
	__sync_fetch_and_add(&ebt_sets, 1);
#ifdef NFTRACE_KPROBE
	ebt_call_begins(sp_of(ctx), CALL_EBT_SET, 0, 0, 0);
#endif
	return 0;
}

#ifndef NFTRACE_KPROBE
SEC("fexit/ebt_do_table")
int BPF_PROG(ebt_end, u64 table, struct sk_buff *skb,
	     struct nf_hook_state *state, u32 verdict)
{
	return ebt_leave((u64)state, table, skb, get(state, hook), verdict);
}

SEC("fexit/do_replace_finish")
int BPF_PROG(ebt_replaced, struct net *net, struct ebt_replace *repl,
	     void *info, int ret)
{
	return ebt_table_replaced(net, repl, (u64)info, ret);
}

SEC("fexit/do_ebt_set_ctl")
int BPF_PROG(ebt_set_over, struct sock *sk, int cmd)
{
	if (cmd == EBT_SO_SET_COUNTERS)
		__sync_fetch_and_add(&ebt_sets_over, 1);
	return 0;
}
#else
SEC("kprobe/ebt_do_table")
int BPF_KPROBE(ebt_begin_last, struct sk_buff *skb, struct nf_hook_state *state,
	       u64 table)
{
	return ebt_begins(sp_of(ctx), table, skb, state);
}

SEC("kretprobe/ebt_do_table")
int BPF_KRETPROBE(ebt_end, u32 verdict)
{
	struct nf_hook_state *state;
	struct call_args a;

	if (!ebt_call_ends(sp_had(ctx), CALL_EBT, &a))
		return 0;
	state = (void *)a.c;
	return ebt_leave(a.c, a.a, (void *)a.b, get(state, hook), verdict);
}

SEC("kretprobe/do_replace_finish")
int BPF_KRETPROBE(ebt_replaced, int ret)
{
	struct call_args a;

	if (!ebt_call_ends(sp_had(ctx), CALL_EBT_REPLACE, &a))
		return 0;
	return ebt_table_replaced((void *)a.a, (void *)a.b, a.c, ret);
}

/* One that is not seen, which may be if more are under way than CPUs, leaves runs unresolved. */
SEC("kretprobe/do_ebt_set_ctl")
int BPF_KRETPROBE(ebt_set_over)
{
	struct call_args a;

	if (ebt_call_ends(sp_had(ctx), CALL_EBT_SET, &a))
		__sync_fetch_and_add(&ebt_sets_over, 1);
	return 0;
}
#endif

/* ---- at start ---- */

struct symbols {
	u64 per_cpu_offset, preempt_count, pcpu_hot;
	u64 xt_recseq, xt_pernet_id; /* of module x_tables */
	u64 nft_net_id;		     /* nf_tables_net_id, of module nf_tables */
	u64 ebt_pernet_id;	     /* of module ebtables */
	u32 pernet_id;		     /* what xt_pernet_id holds */
	u32 nft_id;		     /* what nf_tables_net_id holds */
	u32 ebt_id;		     /* what ebt_pernet_id holds */
};

struct symbols found_symbols = {};

/*
 * Run by the loader: looks symbols up, far faster than /proc/kallsyms, where it can, and reads
 * what stands at some. Who the loader is, it cannot know itself in a PID namespace.
 */
SEC(RUN)
int find_symbols(void *ctx)
{
	struct symbols *f = &found_symbols;

	self_tgid = bpf_get_current_pid_tgid() >> 32;
#ifndef NFTRACE_KPROBE
	bpf_kallsyms_lookup_name("__per_cpu_offset", 17, 0, &f->per_cpu_offset);
	bpf_kallsyms_lookup_name("__preempt_count", 16, 0, &f->preempt_count);
	bpf_kallsyms_lookup_name("pcpu_hot", 9, 0, &f->pcpu_hot);
	bpf_kallsyms_lookup_name("xt_recseq", 10, 0, &f->xt_recseq);
	bpf_kallsyms_lookup_name("xt_pernet_id", 13, 0, &f->xt_pernet_id);
	bpf_kallsyms_lookup_name("nf_tables_net_id", 17, 0, &f->nft_net_id);
	bpf_kallsyms_lookup_name("ebt_pernet_id", 14, 0, &f->ebt_pernet_id);
#endif
	if (f->xt_pernet_id)
		bpf_probe_read_kernel(&f->pernet_id, sizeof(f->pernet_id),
				      (void *)f->xt_pernet_id);
	if (f->nft_net_id)
		bpf_probe_read_kernel(&f->nft_id, sizeof(f->nft_id),
				      (void *)f->nft_net_id);
	if (f->ebt_pernet_id)
		bpf_probe_read_kernel(&f->ebt_id, sizeof(f->ebt_id),
				      (void *)f->ebt_pernet_id);
	return 0;
}

/* Of the namespace of whoever runs nft_state: 1 + whether rules may be about to change. */
u32 nft_busy = 0;

/*
 * Run by the loader, in a namespace: whether its generation has a number already, and its rules
 * are not yet in force. That is not so if nobody holds the lock of transactions, nor before their
 * commit.
 */
SEC(RUN)
int nft_state(void *ctx)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct net *net = BPF_CORE_READ(task, nsproxy, net_ns);
	u32 netns = BPF_CORE_READ(net, ns.inum), gen;
	struct nft_gen *had;
	u64 pernet, owner = 0;

	pernet = nft_pernet(net);
	if (bpf_probe_read_kernel(&owner, sizeof(owner),
				  (void *)(pernet + nft_lock)))
		return 1;
	nft_busy = 1 + !!owner;
	had = bpf_map_lookup_elem(&nft_gens, &netns);
	if (!owner || !had || !had->sure)
		return 0;
	gen = nft_generation(net);
	if (nft_parity(net, gen) == had->parity)
		nft_busy = 1;
	return 0;
}

/* The names of the tables that ebt_list found. */
struct ebt_names {
	u32 n;
	char name[8][32];
};

struct ebt_names ebt_names = {};

/* Run by the loader, in a namespace: which tables of ebtables are there. */
SEC(RUN)
int ebt_list(void *ctx)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct net *net = BPF_CORE_READ(task, nsproxy, net_ns);
	u64 head = ebt_tables_of(net), at = head;

	ebt_names.n = 0;
#pragma nounroll
	for (u32 i = 0; i < 8; i++) {
		/* A struct ebt_table begins with its struct list_head. */
		at = at ? read_u64(at) : 0;
		if (!at || at == head)
			break;
		bpf_probe_read_kernel(ebt_names.name[i],
				      sizeof(ebt_names.name[i]),
				      (void *)(at + ebt_name));
		ebt_names.n = i + 1;
	}
	return 0;
}

/*
 * What nft_look found: where struct nftables_pernet is, what it begins with, and its first table.
 */
struct nft_looked {
	u64 at;
	u32 family;
	char name[12];
	u64 words[32];
};

struct nft_looked nft_looked = {};

#ifdef NFTRACE_KPROBE
/* Run by the loader, in a namespace of its own, where no type information says what is where. */
SEC(RUN)
int nft_look(void *ctx)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct net *net = BPF_CORE_READ(task, nsproxy, net_ns);
	struct nft_table *table;

	nft_looked.at = nft_pernet(net);
	/* Both begin with a struct list_head. */
	table = (void *)read_u64(nft_looked.at);
	nft_looked.family = BPF_CORE_READ_BITFIELD_PROBED(table, family);
	bpf_probe_read_kernel_str(nft_looked.name, sizeof(nft_looked.name),
				  BPF_CORE_READ(table, name));
	return !!bpf_probe_read_kernel(nft_looked.words,
				       sizeof(nft_looked.words),
				       (void *)nft_looked.at);
}
#endif

/* So that bpf2go finds the types that no map holds. */
const struct rec_hook *unused_rec_hook __attribute__((unused));
const struct rec_dev *unused_rec_dev __attribute__((unused));
const struct rec_nat *unused_rec_nat __attribute__((unused));
const struct new_table *unused_new_table __attribute__((unused));
const struct rec_nft *unused_rec_nft __attribute__((unused));
const struct rec_flow *unused_rec_flow __attribute__((unused));
const struct rec_ebt *unused_rec_ebt __attribute__((unused));
const enum nft_what unused_nft_what __attribute__((unused)) = 0;
const struct rec_pkt *unused_rec_pkt __attribute__((unused));
const enum rec_type unused_rec_type __attribute__((unused)) = 0;
const enum rec_flag unused_rec_flag __attribute__((unused)) = 0;
const enum pkt_flag unused_pkt_flag __attribute__((unused)) = 0;
const enum loss unused_loss __attribute__((unused)) = 0;
const enum limits unused_limits __attribute__((unused)) = 0;
const struct xt_table_head *unused_head __attribute__((unused));
