/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Everything in which kernels differ, each with the commit that changed it.
 * No other file knows of a kernel version.
 */
#ifndef NFTRACE_COMPAT_H
#define NFTRACE_COMPAT_H

#include "maps.h"

/*
 * 354259fa73e2 ("net: remove skb->vlan_present", 6.1): a tag is present where
 * vlan_all is not 0; before, a bit said so. Returns 1 + VLAN id, or 0.
 */
struct sk_buff___6_0 {
	u8 vlan_present : 1;
} __attribute__((preserve_access_index));

static __always_inline u16 vlan_of(struct sk_buff *skb)
{
	struct sk_buff___6_0 *old = (void *)skb;

	if (bpf_core_field_exists(skb->vlan_all) ?
		    get(skb, vlan_all) :
		    bpf_core_field_exists(old->vlan_present) &&
			    get_bits(old, vlan_present))
		return (get(skb, vlan_tci) & 0xfff) + 1;
	return 0;
}

/*
 * 2d5c91e1cc14 ("bpf: rdonly_untrusted_mem for btf id walk pointer leafs", 6.17): to the
 * verifier a field that points to bytes is a pointer then, with which neither arithmetic nor
 * calls are allowed that take a number; before, it was a number. Negated, it is one again.
 */
static __always_inline u64 number(const void *p)
{
	u64 n = (u64)p;

	asm volatile("%0 = -%0" : "+r"(n));
	return -n;
}

/*
 * skb->protocol, host byte order. Of what a program made whole with IP_HDRINCL, the kernel says
 * it before OUTPUT from c9b3b81716c5 ("ipv4: raw: Fix sending packets from raw sockets via IPsec
 * tunnels", 6.9 and stable kernels) on.
 */
static __always_inline u16 protocol_of(struct sk_buff *skb)
{
	u16 protocol = bpf_ntohs(get(skb, protocol));
	u8 version = 0;

	if (protocol)
		return protocol;
	bpf_probe_read_kernel(
		&version, sizeof(version),
		(void *)(number(get(skb, head)) + get(skb, network_header)));
	return version >> 4 == 4 ? ETH_P_IP :
	       version >> 4 == 6 ? ETH_P_IPV6 :
				   0;
}

/* fc7566ad0a82 ("bpf: Introduce bpf_preempt_[disable,enable] kfuncs"), 6.10 */
extern void bpf_preempt_disable(void) __ksym __weak;
extern void bpf_preempt_enable(void) __ksym __weak;

/*
 * a35b9af4ec2c ("bpf: Add a kfunc for generic type cast", 6.2): memory at an address is
 * loaded as a field of a kernel's struct, for a fifth of what the helper costs.
 */
extern void *bpf_rdonly_cast(const void *obj, u32 btf_id) __ksym __weak;

/* Kprobes do without kernel functions. */
#ifndef NFTRACE_KPROBE
#define has_preempt_disable (bpf_preempt_disable != NULL)
#define has_rdonly_cast	    (bpf_rdonly_cast != NULL)
#else
#define has_preempt_disable false
#define has_rdonly_cast	    false
#endif

/* skb->_nfct, which kernels without CONFIG_NF_CONNTRACK do not have. */
static __always_inline u64 nfct_of(struct sk_buff *skb)
{
	return bpf_core_field_exists(skb->_nfct) ? get(skb, _nfct) : 0;
}

/*
 * Of a packet in a bridge: whether br_netfilter leads it through the IP hooks, too. Without
 * CONFIG_BRIDGE_NETFILTER another extension is the first.
 */
static __always_inline bool from_br_netfilter(struct sk_buff *skb)
{
	return bpf_core_enum_value_exists(enum skb_ext_id, SKB_EXT_BRIDGE_NF) &&
	       (get(skb, active_extensions) & (1 << SKB_EXT_BRIDGE_NF));
}

/* Its struct nf_bridge_info (include/linux/skbuff.h:skb_ext_find), 0 if there is none. */
static __always_inline u64 bridge_info(struct sk_buff *skb)
{
	struct skb_ext *ext;

	if (!from_br_netfilter(skb))
		return 0;
	ext = get(skb, extensions);
	return (u64)ext + ((u32)get(ext, offset[SKB_EXT_BRIDGE_NF]) << 3);
}

static __always_inline bool in_prerouting(struct nf_bridge_info *nb)
{
	if (has_rdonly_cast) {
		nb = bpf_rdonly_cast(
			nb, bpf_core_type_id_kernel(struct nf_bridge_info));
		return BPF_CORE_READ_BITFIELD(nb, in_prerouting);
	}
	return BPF_CORE_READ_BITFIELD_PROBED(nb, in_prerouting);
}

/* Three words of memory, loaded through a struct of the kernel's that is three words. */
struct words {
	u64 a, b, c;
};

static __always_inline bool read_words(struct words *w, const void *at)
{
	if (has_rdonly_cast) {
		struct bpf_perf_event_value *v = bpf_rdonly_cast(
			at,
			bpf_core_type_id_kernel(struct bpf_perf_event_value));

		w->a = v->counter;
		w->b = v->enabled;
		w->c = v->running;
		return true;
	}
	return !bpf_probe_read_kernel(w, sizeof(*w), at);
}

/*
 * Words of memory, loaded one by one through a struct of the kernel's that is words only.
 * Only where there is bpf_rdonly_cast. What cannot be read is 0.
 */
struct many_words {
	u64 w[24];
};

static __always_inline const struct many_words *words_at(const void *at)
{
	return bpf_rdonly_cast(
		at, bpf_core_type_id_kernel(struct rtnl_link_stats64));
}

/* A word of memory; 0 if it cannot be read. cast is whether there is bpf_rdonly_cast. */
static __always_inline u64 read_word(u64 at, const bool cast)
{
	u64 v = 0;

	if (cast)
		return words_at((void *)at)->w[0];
	bpf_probe_read_kernel(&v, sizeof(v), (void *)at);
	return v;
}

static __always_inline u64 read_u64(u64 at)
{
	return has_rdonly_cast ? read_word(at, true) : read_word(at, false);
}

static __always_inline u32 read_u32(u64 at)
{
	u32 v = 0;

	if (has_rdonly_cast)
		return *(const u32 *)words_at((void *)at);
	bpf_probe_read_kernel(&v, sizeof(v), (void *)at);
	return v;
}

/*
 * 9874808878d9 ("netfilter: bridge: replace physindev with physinif in nf_bridge_info", 6.8
 * and stable kernels). Returns the index of the port that a packet at a bridge came in by.
 */
struct nf_bridge_info___6_7 {
	struct net_device *physindev;
} __attribute__((preserve_access_index));

static __always_inline u32 physin_of(u64 nb)
{
	struct net_device *dev;

	if (bpf_core_field_exists(struct nf_bridge_info, physinif))
		return read_u32(nb + bpf_core_field_offset(
					     struct nf_bridge_info, physinif));
	dev = (void *)read_u64(
		nb +
		bpf_core_field_offset(struct nf_bridge_info___6_7, physindev));
	return dev ? BPF_CORE_READ(dev, ifindex) : 0;
}

/*
 * Whether nf_hook_slow freed a packet: the kernel says why from 2df3041ba3be
 * ("net: netfilter: use kfree_drop_reason() for NF_DROP", 5.18) on; before, it says where.
 */
static __always_inline bool hook_dropped(u64 location, u64 *ctx)
{
	if (bpf_core_enum_value_exists(enum skb_drop_reason,
				       SKB_DROP_REASON_NETFILTER_DROP))
		return (u32)((volatile u64 *)ctx)[2] ==
		       bpf_core_enum_value(enum skb_drop_reason,
					   SKB_DROP_REASON_NETFILTER_DROP);
	return location - sym_hook_slow < hook_slow_size;
}

/*
 * The list of a namespace's tables of a family, 0 if there is none. 1d610d4d31a8 ("netfilter:
 * x_tables: move known table lists to net_generic infra", 5.13) moved it from struct net to
 * struct xt_pernet, whose number in net->gen (xt_pernet_id) the loader found.
 */
struct list_head {
	u64 next, prev;
};

struct netns_xt___5_13 {
	struct list_head tables[13];
} __attribute__((preserve_access_index));

struct net___5_13 {
	struct netns_xt___5_13 xt;
} __attribute__((preserve_access_index));

static __always_inline u64 xt_tables_of(struct net *net, u32 pernet_id, u32 pf)
{
	u64 lists;

	if (bpf_core_field_exists(struct net___5_13, xt.tables))
		lists = (u64)net +
			bpf_core_field_offset(struct net___5_13, xt.tables);
	else
		lists = read_u64((u64)get(net, gen) + 8UL * pernet_id);
	return lists ? lists + pf * sizeof(struct list_head) : 0;
}

/*
 * The same of ebtables, whose tables 5b53951cfc85 ("netfilter: ebtables: use net_generic infra",
 * 5.13) moved to struct ebt_pernet.
 */
static __always_inline u64 ebt_tables_of(struct net *net)
{
	if (bpf_core_field_exists(struct net___5_13, xt.tables))
		return (u64)net +
		       bpf_core_field_offset(struct net___5_13, xt.tables) +
		       NFPROTO_BRIDGE * sizeof(struct list_head);
	return read_u64((u64)BPF_CORE_READ(net, gen) + 8UL * ebt_net_id);
}

/*
 * ebt_do_table's arguments are table, skb and state from f0d6764f7ddb ("netfilter: ebtables: allow
 * use of ebt_do_table as hookfn", 5.16) on; before, the table came last: ebt_begin_last.
 */

/* __per_cpu_offset of each CPU; it does not change, and reading it costs. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64);
} percpu_base SEC(".maps");

/* What is added to the offset of a per-CPU variable for its copy on this CPU. */
__verified_once u64 this_cpu(void)
{
	u32 zero = 0, cpu;
	u64 *base = bpf_map_lookup_elem(&percpu_base, &zero);

	if (!base)
		return 0;
	if (!*base) {
		cpu = bpf_get_smp_processor_id();
		bpf_probe_read_kernel(base, sizeof(*base),
				      (void *)(sym_per_cpu_offset + 8UL * cpu));
	}
	return *base;
}

/*
 * Whether this runs in a softirq (or an interrupt), not for the task that is current
 * (include/linux/preempt.h:in_serving_softirq).
 *
 * x86 keeps the count in a per-CPU variable: __preempt_count, from 64701838bf05
 * ("x86/percpu: Move preempt_count next to current_task", 6.2) to 46e8fff6d45f
 * ("x86/preempt: Move preempt count to percpu hot section", 6.15) in pcpu_hot.
 * arm64 keeps it in the task.
 */
struct preempt___arm64 {
	u32 count;
} __attribute__((preserve_access_index));

struct thread_info___arm64 {
	struct preempt___arm64 preempt;
} __attribute__((preserve_access_index));

struct task_struct___arm64 {
	struct thread_info___arm64 thread_info;
} __attribute__((preserve_access_index));

#define SERVING_SOFTIRQ_HARDIRQ_NMI 0x00ff0100
#define SOFTIRQ_HARDIRQ_NMI	    0x00ffff00

static __always_inline u32 preempt_count(u64 percpu)
{
	u64 at = 0;

	if (sym_preempt_count) {
		at = percpu + sym_preempt_count;
	} else if (sym_pcpu_hot) {
		if (bpf_core_field_exists(struct pcpu_hot, preempt_count))
			at = percpu + sym_pcpu_hot +
			     bpf_core_field_offset(struct pcpu_hot,
						   preempt_count);
	} else if (bpf_core_field_exists(struct task_struct___arm64,
					 thread_info.preempt.count)) {
		at = bpf_get_current_task() +
		     bpf_core_field_offset(struct task_struct___arm64,
					   thread_info.preempt.count);
	}
	return at ? read_u32(at) : 0;
}

static __always_inline bool in_softirq(u64 percpu)
{
	return preempt_count(percpu) & SERVING_SOFTIRQ_HARDIRQ_NMI;
}

/* Whether no softirq can come here (include/linux/preempt.h:in_interrupt). */
static __always_inline bool bh_off(u64 percpu)
{
	return preempt_count(percpu) & SOFTIRQ_HARDIRQ_NMI;
}

/*
 * What __nft_trace_packet is told. 698bb828a6c2, 0a202145d5f9 and 46df417544f4 ("netfilter:
 * nf_tables: do not store pktinfo/verdict/rule in traceinfo structure", 6.4) made arguments of
 * what stood in struct nft_traceinfo before.
 */
struct nft_traceinfo___6_3 {
	bool trace;
	const struct nft_pktinfo *pkt;
	const struct nft_base_chain *basechain;
	const struct nft_rule_dp *rule;
	const struct nft_verdict *verdict;
} __attribute__((preserve_access_index));

/*
 * The generation of a namespace's rulesets, as NFTA_GEN_ID has it. 64102d9bbc3d ("netfilter:
 * nf_tables: place base_seq in struct net", 6.17 and stable kernels) moved it there; before, struct
 * nftables_pernet held it, whose number in net->gen (nf_tables_net_id) the loader found.
 */
static __always_inline u64 nft_pernet(struct net *net)
{
	return read_u64((u64)BPF_CORE_READ(net, gen) + 8UL * nft_net_id);
}

static __always_inline u32 nft_generation(struct net *net)
{
	u64 pernet;

	if (bpf_core_field_exists(net->nft.base_seq))
		return BPF_CORE_READ(net, nft.base_seq);
	pernet = nft_pernet(net);
	return pernet ? read_u32(pernet + nft_seq) : 0;
}

/*
 * 3f00c5239344 ("bpf: Allow trusted pointers to be passed to KF_TRUSTED_ARGS kfuncs",
 * 6.2): a tracepoint's arguments are trusted, and for each pointer that is read through
 * one the verifier searches all type information of the kernel, four times. Through one that
 * was cast it does not.
 */
static __always_inline struct sk_buff *untrusted(struct sk_buff *skb)
{
	if (!has_rdonly_cast)
		return skb;
	return bpf_rdonly_cast(skb, bpf_core_type_id_kernel(struct sk_buff));
}

#endif
