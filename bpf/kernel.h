/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The kernel's structs, with the few fields that nftrace reads. CO-RE finds
 * each field by name in the running kernel; nothing here is an offset.
 */
#ifndef NFTRACE_KERNEL_H
#define NFTRACE_KERNEL_H

#include <linux/types.h>
#include <linux/bpf.h>

/* A probed function's registers, as <asm/ptrace.h> of each architecture has them. */
struct pt_regs {
	unsigned long r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx,
		rdx, rsi, rdi, orig_rax, rip, cs, eflags, rsp, ss;
};

struct user_pt_regs {
	__u64 regs[31];
	__u64 sp, pc, pstate;
};

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_endian.h>

#define bool  _Bool
#define true  1
#define false 0
#define NULL  ((void *)0)

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef int s32;

#pragma clang attribute push(__attribute__((preserve_access_index)),           \
			     apply_to = record)

struct ns_common {
	unsigned int inum;
};

struct nf_hook_entries;

struct netns_nf {
	struct nf_hook_entries *hooks_ipv4[5];
	struct nf_hook_entries *hooks_ipv6[5];
	struct nf_hook_entries *hooks_bridge[5];
};

struct net_generic;

struct netns_nftables {
	unsigned int base_seq;
	u8 gencursor;
};

struct net {
	struct ns_common ns;
	struct net_generic *gen;
	struct netns_nf nf;
	struct netns_nftables nft;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct net_device {
	char name[16];
	int ifindex;
	unsigned short type;
	unsigned short hard_header_len;
	possible_net_t nd_net;
};

typedef struct {
	u32 val;
} kuid_t;

struct cred {
	kuid_t fsuid;
	kuid_t fsgid;
};

struct file {
	const struct cred *f_cred;
};

struct socket {
	struct file *file;
};

struct sock_common {
	volatile unsigned char skc_state;
	possible_net_t skc_net;
};

struct sock {
	struct sock_common __sk_common;
	struct socket *sk_socket;
};

struct skb_ext {
	u8 offset[1];
};

struct sk_buff {
	struct net_device *dev;
	struct sock *sk;
	unsigned long _nfct;
	unsigned int len, data_len;
	u8 cloned : 1;
	u32 mark;
	u32 vlan_all;
	u16 vlan_tci;
	u16 protocol;
	u16 network_header;
	u16 mac_header;
	u32 tail; /* NET_SKBUFF_DATA_USES_OFFSET */
	int skb_iif;
	unsigned char *head;
	unsigned char *data;
	u8 active_extensions;
	struct skb_ext *extensions;
};

struct nf_bridge_info {
	u8 in_prerouting : 1;
	int physinif;
	struct net_device *physoutdev;
};

struct nf_hook_state {
	u8 hook;
	u8 pf;
	struct net_device *in;
	struct net_device *out;
	struct net *net;
};

struct nf_queue_entry {
	struct sk_buff *skb;
	struct nf_hook_state state;
};

struct nf_conn {
	possible_net_t ct_net;
	unsigned long status;
	u32 mark;
};

struct net_bridge_port {
	struct net_device *dev;
};

struct nsproxy {
	struct net *net_ns;
};

struct task_struct {
	struct nsproxy *nsproxy;
};

struct xt_table {
	u8 af;
	char name[32];
};

/* include/net/netfilter/nf_tables.h */
struct nft_table {
	u64 handle;
	u16 family : 6;
	char *name;
};

struct nft_chain {
	struct nft_table *table;
	u64 handle;
	char *name;
};

struct nft_base_chain {
	u8 policy;
	struct nft_chain chain;
};

struct nft_verdict {
	u32 code;
	struct nft_chain *chain;
};

struct nft_rule_dp {
	u64 is_last : 1, dlen : 12, handle : 42;
};

struct nft_rule_dp_last {
	const struct nft_chain *chain;
};

struct nft_pktinfo {
	struct sk_buff *skb;
	const struct nf_hook_state *state;
};

struct nft_traceinfo {
	bool trace;
	const struct nft_base_chain *basechain;
};

/* include/linux/netfilter_bridge/ebtables.h */
struct ebt_table {
	char name[32];
	void *private;
};

struct ebt_replace {
	char name[32];
};

struct ebt_counter {
	u64 pcnt;
};

struct ebt_table_info {
	unsigned int nentries;
	struct ebt_counter counters[1];
};

struct bpf_array {
	void *ptrs[1];
};

typedef struct {
	u64 v;
} u64_stats_t;

struct bpf_prog_stats {
	u64_stats_t misses;
};

struct bpf_prog {
	struct bpf_prog_stats *stats;
};

struct pcpu_hot {
	int preempt_count;
};

struct rtnl_link_stats64 {
	u64 rx_packets;
};

#pragma clang attribute pop

enum skb_drop_reason { SKB_DROP_REASON_NETFILTER_DROP = 1 };

enum skb_ext_id { SKB_EXT_BRIDGE_NF };

#define NFPROTO_IPV4   2
#define NFPROTO_ARP    3
#define NFPROTO_BRIDGE 7
#define NFPROTO_IPV6   10

#define NF_DROP		0
#define NF_ACCEPT	1
#define NF_STOLEN	2
#define NF_VERDICT_MASK 0xff

#define NFT_CONTINUE -1
#define NFT_JUMP     -3
#define NFT_GOTO     -4

/* enum nft_trace_types */
#define NFT_TRACETYPE_POLICY 1
#define NFT_TRACETYPE_RETURN 2

#define NF_INET_PRE_ROUTING  0
#define NF_INET_LOCAL_IN     1
#define NF_INET_LOCAL_OUT    3
#define NF_INET_POST_ROUTING 4

#define NF_BR_BROUTING 5

#define EBT_SO_SET_COUNTERS 129

#define IP_CT_IS_REPLY 3

/* Bit of nf_conn.status. */
#define IPS_CONFIRMED 0x8

#define ETH_P_IP   0x0800
#define ETH_P_ARP  0x0806
#define ETH_P_RARP 0x8035
#define ETH_P_IPV6 0x86dd

#define TCP_TIME_WAIT	 6
#define TCP_NEW_SYN_RECV 12

/*
 * How probes are attached to functions and tracepoints, and how they read a field, or a bit
 * field, of a kernel's struct that they were given. sp_of() names the call that is probed:
 * where in the stack it is.
 */
#ifndef NFTRACE_KPROBE
#define ENTRY		   "fentry/"
#define TRACEPOINT	   "tp_btf/"
#define RUN		   "syscall"
#define BPF_ENTRY	   BPF_PROG
#define sp_of(ctx)	   ((u64)(ctx))
#define get(p, field)	   ((p)->field)
#define get_bits(p, field) BPF_CORE_READ_BITFIELD(p, field)
#else
#define ENTRY	   "kprobe/"
#define TRACEPOINT "raw_tp/"
#define RUN	   "raw_tp/"
#define BPF_ENTRY  BPF_KPROBE
#define sp_of(ctx) ((u64)PT_REGS_SP((struct pt_regs *)(ctx)))
/* The same where it returns: x86 has popped where to. */
#ifdef __TARGET_ARCH_x86
#define sp_had(ctx) (sp_of(ctx) - 8)
#else
#define sp_had(ctx) sp_of(ctx)
#endif
#define get(p, field)	   BPF_CORE_READ(p, field)
#define get_bits(p, field) BPF_CORE_READ_BITFIELD_PROBED(p, field)
#endif

/*
 * bpf_loop, for loops of at most max rounds: where there is none, the verifier follows each
 * round.
 */
#ifndef NFTRACE_KPROBE
#define loop(n, max, f, ctx) bpf_loop(n, f, ctx, 0)
#else
#define loop(n, max, f, ctx)                                                   \
	({                                                                     \
		_Pragma("clang loop unroll(disable)") for (                    \
			u32 __i = 0; __i < (max) && __i < (n);                 \
			__i++) if (f(__i, ctx)) break;                         \
	})
#endif

/*
 * Tells the verifier a bound that clang, which knows it from the code above, would
 * optimise away.
 */
#define bounded(n, mask)                                                       \
	({                                                                     \
		u64 __n = (n);                                                 \
		asm volatile("%0 &= %1" : "+r"(__n) : "i"(mask));              \
		__n;                                                           \
	})

/* Whether n is not 0, without a branch, of which the verifier would follow both ways. */
#define nonzero(n)                                                             \
	({                                                                     \
		u64 __n = (n);                                                 \
		__n |= -__n;                                                   \
		asm volatile("%0 >>= 63" : "+r"(__n));                         \
		__n;                                                           \
	})

/*
 * For a function that is not static: the verifier looks at it once for each program, and
 * not anew for all that its callers know, nor at them for each of its results. A pointer
 * may be NULL there. It cannot be called with preemption off: the loader makes it static in
 * a program that turns it off.
 */
#define __verified_once __noinline

/* The same for one that takes a pointer: kernels that have only kprobes do not let it. */
#ifndef NFTRACE_KPROBE
#define __verified_once_mem __noinline
#else
#define __verified_once_mem static __noinline
#endif

/* A part of a function that is one of its own with kprobes, which need too much stack together. */
#ifndef NFTRACE_KPROBE
#define __apart __always_inline
#else
#define __apart __noinline
#endif

#endif
