/* SPDX-License-Identifier: GPL-2.0 */
/* Which packets are followed: decided here, before anything is recorded. */
#ifndef NFTRACE_FILTER_H
#define NFTRACE_FILTER_H

#include "maps.h"
#include "tuple.h"

/*
 * The filter expression. The loader puts what pkg/filter made of the user's
 * words in the place of this body.
 */
static __noinline int filter_expr(struct pkt_tuple *t)
{
	/* Keeps clang from looking through the call. */
	asm volatile("" ::"r"(t) : "memory");
	return t->len != 0;
}

static __always_inline bool match_iface(struct net *net, struct net_device *dev)
{
	struct iface key;

	if (!dev)
		return false;
	key.netns = net->ns.inum;
	key.ifindex = dev->ifindex;
	return bpf_map_lookup_elem(&filter_ifaces, &key);
}

static __always_inline bool match_addrs(struct pkt_tuple *t)
{
	struct addr a;

	__builtin_memcpy(a.b, t->saddr, sizeof(a.b));
	if (bpf_map_lookup_elem(&filter_addrs, &a))
		return true;
	__builtin_memcpy(a.b, t->daddr, sizeof(a.b));
	return bpf_map_lookup_elem(&filter_addrs, &a);
}

static __always_inline bool match_places(struct nf_hook_state *state)
{
	u32 netns = state->net->ns.inum;

	if (use_netns && bpf_map_lookup_elem(&filter_netns, &netns))
		return true;
	return use_ifaces && (match_iface(state->net, state->in) ||
			      match_iface(state->net, state->out));
}

/* Sent by this host, and not yet received by anybody (skb->skb_iif is 0). */
static __always_inline bool is_local(struct sk_buff *skb)
{
	return !skb->skb_iif;
}

/*
 * Whether a packet at this hook cannot look different from what it was at a hook
 * before: then it did not match there, and need not be looked at again.
 */
static __always_inline bool seen_before(struct sk_buff *skb,
					struct nf_hook_state *state)
{
	u8 pf = state->pf, hook = state->hook;

	/* Without a filter it is a copy of a packet that is followed. */
	if ((!use_expr && !use_places) || is_local(skb))
		return false;
	/* FORWARD or the bridge's OUTPUT came before; SNAT comes at the end. */
	return hook == NF_INET_POST_ROUTING ||
	       (pf == NFPROTO_BRIDGE && hook == NF_INET_LOCAL_IN);
}

enum match {
	MATCH_NO,
	MATCH_MAYBE, /* not yet: follow it, for it may match further on */
	MATCH_YES,
};

#define OTHER_FLOW_NS 1000000000ULL

/*
 * A hash of what a flow is known by at its first hook. Two flows of a second that share
 * all 64 bits are not told apart; then one of them is followed from further on.
 */
static __always_inline u64 flow_hash(const struct pkt_tuple *t, u32 netns)
{
	const u64 *s = (const u64 *)t->saddr, *d = (const u64 *)t->daddr;
	u64 h = (u64)t->sport << 48 | (u64)t->dport << 32 |
		(u32)t->ethertype << 8 | t->nexthdr;

	/* The multiplier of Knuth's 64-bit generator (MMIX). */
#define MIX(v) h = ((h ^ (v)) * 6364136223846793005ULL) ^ (h >> 29)
	MIX(netns);
	MIX(s[0]);
	MIX(s[1]);
	MIX(d[0]);
	MIX(d[1]);
#undef MIX
	return h ^ h >> 32;
}

static __always_inline struct other_flow *other_flow(u64 hash)
{
	u32 key = hash % OTHER_FLOWS;

	return bpf_map_lookup_elem(&other_flows, &key);
}

/*
 * Whether to follow a packet that is at a hook. One that does not match may do so
 * later: behind the next interface, in the next namespace, or when NAT has changed
 * its addresses; and then its whole path is wanted. So the first packet of a flow is
 * followed tentatively from its first hook on. If the filter never matched it,
 * packets of the same flow are left alone for a second (other_flows).
 */
static __always_inline enum match match(struct sk_buff *skb,
					struct nf_hook_state *state, u64 *flow)
{
	struct pkt_tuple t = {};
	bool place, expr = true;
	struct other_flow *other;

	if (seen_before(skb, state))
		return MATCH_NO;
	place = !use_places || match_places(state);
	if (!use_expr && !use_addrs && place)
		return MATCH_YES;
	parse_tuple(&t, skb);
	if (use_addrs && !place)
		place = match_addrs(&t);
	if (use_expr)
		expr = filter_expr(&t);
	if (place && expr)
		return MATCH_YES;

	if (!expr && !use_nat)
		return MATCH_NO;
	if (state->hook != NF_INET_PRE_ROUTING && !is_local(skb))
		return MATCH_NO;
	if (t.ethertype != ETH_P_IP && t.ethertype != ETH_P_IPV6)
		return MATCH_NO;
	*flow = flow_hash(&t, state->net->ns.inum);
	other = other_flow(*flow);
	if (other && other->hash == *flow &&
	    bpf_ktime_get_ns() - other->when < OTHER_FLOW_NS)
		return MATCH_NO;
	return MATCH_MAYBE;
}

/* Whether a packet that is handed to a device matches there. */
static __always_inline bool match_dev(struct sk_buff *skb,
				      struct net_device *dev)
{
	struct pkt_tuple t = {};

	if (use_places && !match_iface(dev->nd_net.net, dev))
		return false;
	if (!use_expr)
		return true;
	parse_tuple(&t, skb);
	return filter_expr(&t);
}

/* Whether anything is registered at a hook (include/net/netns/netfilter.h). */
static __always_inline bool hook_in_use(struct net *net, u8 pf, u32 hook)
{
	struct nf_hook_entries **hooks, *e = NULL;

	if (pf == NFPROTO_IPV4)
		hooks = net->nf.hooks_ipv4;
	else if (pf == NFPROTO_IPV6)
		hooks = net->nf.hooks_ipv6;
	else if (pf == NFPROTO_BRIDGE &&
		 bpf_core_field_exists(net->nf.hooks_bridge))
		hooks = net->nf.hooks_bridge;
	else
		return false;
	bpf_probe_read_kernel(&e, sizeof(e), hooks + hook);
	return e;
}

static __always_inline bool is_fragment(struct sk_buff *skb)
{
	unsigned char *l3 = skb->head + skb->network_header;
	u16 frag_off = 0;
	u8 nexthdr = 0;

	if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		bpf_probe_read_kernel(&nexthdr, sizeof(nexthdr), l3 + 6);
		return nexthdr == IPPROTO_FRAG;
	}
	bpf_probe_read_kernel(&frag_off, sizeof(frag_off), l3 + 6);
	return frag_off & bpf_htons(0x3fff); /* more fragments, or an offset */
}

/*
 * Whether a packet that matches here for the first time has passed a hook of this
 * namespace before, at which it did not match.
 */
static __always_inline bool matched_late(struct sk_buff *skb,
					 struct nf_hook_state *state)
{
	struct net *net = state->net;
	u8 pf = state->pf, hook = state->hook;
	bool local = is_local(skb);

	if ((!use_places && !use_expr) || hook == NF_INET_PRE_ROUTING)
		return false;
	/* A piece of a packet that had to be cut behind the rules begins here. */
	if (pf == NFPROTO_BRIDGE && local && is_fragment(skb))
		return false;
	if (pf == NFPROTO_BRIDGE && local) {
		/* Sent by this host through a bridge: the IP hooks came first. */
		pf = skb->protocol == bpf_htons(ETH_P_IPV6) ? NFPROTO_IPV6 :
							      NFPROTO_IPV4;
		return hook_in_use(net, pf, NF_INET_LOCAL_OUT) ||
		       hook_in_use(net, pf, NF_INET_POST_ROUTING);
	}
	if (hook == NF_INET_LOCAL_OUT)
		return false;
	return hook_in_use(net, pf,
			   local ? NF_INET_LOCAL_OUT : NF_INET_PRE_ROUTING);
}

#endif
