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
static __always_inline u16 vlan_of(struct sk_buff *skb)
{
	if (bpf_core_field_exists(skb->vlan_all) && skb->vlan_all)
		return (skb->vlan_tci & 0xfff) + 1;
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

/* fc7566ad0a82 ("bpf: Introduce bpf_preempt_[disable,enable] kfuncs"), 6.10 */
extern void bpf_preempt_disable(void) __ksym __weak;
extern void bpf_preempt_enable(void) __ksym __weak;

/*
 * a35b9af4ec2c ("bpf: Add a kfunc for generic type cast", 6.2): memory at an address is
 * loaded as a field of a kernel's struct, for a fifth of what the helper costs.
 */
extern void *bpf_rdonly_cast(const void *obj, u32 btf_id) __ksym __weak;

static __always_inline bool in_prerouting(struct nf_bridge_info *nb)
{
	if (bpf_rdonly_cast) {
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
	if (bpf_rdonly_cast) {
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
	return bpf_rdonly_cast ? read_word(at, true) : read_word(at, false);
}

static __always_inline u32 read_u32(u64 at)
{
	u32 v = 0;

	if (bpf_rdonly_cast)
		return *(const u32 *)words_at((void *)at);
	bpf_probe_read_kernel(&v, sizeof(v), (void *)at);
	return v;
}

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

static __always_inline bool in_softirq(u64 percpu)
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
	return at && read_u32(at) & SERVING_SOFTIRQ_HARDIRQ_NMI;
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
static __always_inline u32 nft_generation(struct net *net, u32 net_id)
{
	struct nftables_pernet *pernet;

	if (bpf_core_field_exists(net->nft.base_seq))
		return BPF_CORE_READ(net, nft.base_seq);
	pernet = (void *)read_u64((u64)BPF_CORE_READ(net, gen) + 8UL * net_id);
	return pernet ? BPF_CORE_READ(pernet, base_seq) : 0;
}

/*
 * 3f00c5239344 ("bpf: Allow trusted pointers to be passed to KF_TRUSTED_ARGS kfuncs",
 * 6.2): a tracepoint's arguments are trusted, and for each pointer that is read through
 * one the verifier searches all type information of the kernel, four times. Through one that
 * was cast it does not.
 */
static __always_inline struct sk_buff *untrusted(struct sk_buff *skb)
{
	if (!bpf_rdonly_cast)
		return skb;
	return bpf_rdonly_cast(skb, bpf_core_type_id_kernel(struct sk_buff));
}

#endif
