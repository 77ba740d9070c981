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
 * Whether anything is registered at a family's PREROUTING (or OUTPUT): then all packets
 * that were received (or sent) pass nf_hook_slow there (include/net/netns/netfilter.h).
 */
static __always_inline bool first_hook_in_use(struct net *net, u8 pf, bool sent)
{
	if (pf == NFPROTO_IPV4)
		return sent ? net->nf.hooks_ipv4[NF_INET_LOCAL_OUT] :
			      net->nf.hooks_ipv4[NF_INET_PRE_ROUTING];
	if (pf == NFPROTO_IPV6)
		return sent ? net->nf.hooks_ipv6[NF_INET_LOCAL_OUT] :
			      net->nf.hooks_ipv6[NF_INET_PRE_ROUTING];
	if (pf == NFPROTO_BRIDGE && bpf_core_field_exists(net->nf.hooks_bridge))
		return sent ? net->nf.hooks_bridge[NF_INET_LOCAL_OUT] :
			      net->nf.hooks_bridge[NF_INET_PRE_ROUTING];
	return false;
}

/*
 * Whether a packet at PREROUTING has been there before: br_netfilter leads it through while
 * it is in the bridge, and if it is for the host, it comes again.
 */
static __always_inline bool came_up_bridge(struct sk_buff *skb)
{
	struct nf_bridge_info *nb;
	struct skb_ext *ext;

	if (!(skb->active_extensions & (1 << SKB_EXT_BRIDGE_NF)))
		return false;
	ext = skb->extensions;
	nb = (void *)ext + ((u32)ext->offset[0] << 3);
	return !BPF_CORE_READ_BITFIELD_PROBED(nb, in_prerouting);
}

/*
 * Whether a packet that is not followed was looked at before on its way through this
 * namespace, and would be no other now: NAT may have changed its addresses, but if the
 * filter looks at nothing else, the first packet of its flow was followed to see what
 * becomes of it (MATCH_MAYBE).
 */
static __always_inline bool seen_before(struct sk_buff *skb,
					struct nf_hook_state *state)
{
	u8 pf = state->pf, hook = state->hook;

	/* Without a filter it is a copy of a packet that is followed. */
	if (!use_expr && !use_places)
		return false;
	/* A clone (of a packet that is flooded) has passed no hook itself. */
	if (hook == NF_INET_LOCAL_OUT || BPF_CORE_READ_BITFIELD(skb, cloned))
		return false;
	if (pf == NFPROTO_BRIDGE) {
		if (hook == NF_INET_POST_ROUTING)
			return !is_local(skb);
		/*
		 * The bridge's own PREROUTING does not run in nf_hook_slow, but for
		 * what br_netfilter brings back from IP's.
		 */
		return !use_ifaces &&
		       skb->active_extensions & (1 << SKB_EXT_BRIDGE_NF);
	}
	if (hook == NF_INET_PRE_ROUTING)
		return !use_ifaces && came_up_bridge(skb);
	if (use_nat && use_detail)
		return false;
	return first_hook_in_use(state->net, pf, is_local(skb));
}

enum match {
	MATCH_NO,
	MATCH_MAYBE, /* not yet: follow it, for it may match further on */
	MATCH_YES,
};

/*
 * What match() decided, in a map's memory: there the verifier forgets on which of its many
 * ways it came to be, and follows the code behind but once.
 */
struct decision {
	u64 flow; /* MATCH_MAYBE: the flow's hash */
	u32 match;
	u32 first; /* a journey begins */
	u32 flags; /* REC_F_LATE */
	u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);
	__type(key, u32);
	__type(value, struct decision);
} decisions SEC(".maps");

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
static __noinline int match(struct sk_buff *skb, struct nf_hook_state *state,
			    struct decision *d)
{
	struct pkt_tuple t = {};
	bool place, maybe, expr = true;
	struct other_flow *other;

	d->match = MATCH_NO;
	d->flow = 0;
	place = !use_places || match_places(state);
	if (!use_expr && !use_addrs && place) {
		d->match = MATCH_YES;
		return 0;
	}
	/* It may match later only if nobody has followed its flow from here to see. */
	maybe = is_local(skb) ||
		(state->hook == NF_INET_PRE_ROUTING && !came_up_bridge(skb));
	if (!place && !use_addrs && !maybe)
		return 0;
	parse_tuple(&t, skb);
	if (use_addrs && !place)
		place = match_addrs(&t);
	if (use_expr)
		expr = filter_expr(&t);
	if (place && expr) {
		d->match = MATCH_YES;
		return 0;
	}

	if (!maybe || (!expr && !use_nat))
		return 0;
	if (t.ethertype != ETH_P_IP && t.ethertype != ETH_P_IPV6)
		return 0;
	d->flow = flow_hash(&t, state->net->ns.inum);
	other = other_flow(d->flow);
	if (other && other->hash == d->flow &&
	    bpf_ktime_get_ns() - other->when < OTHER_FLOW_NS)
		return 0;
	d->match = MATCH_MAYBE;
	return 0;
}

/* Whether a packet that is handed to a device matches there. */
static __noinline int match_dev(struct sk_buff *skb, struct net_device *dev)
{
	struct pkt_tuple t = {};

	if (use_places && !match_iface(dev->nd_net.net, dev))
		return false;
	if (!use_expr)
		return true;
	parse_tuple(&t, skb);
	return filter_expr(&t);
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
		return first_hook_in_use(net, pf, true) ||
		       (pf == NFPROTO_IPV4 ?
				net->nf.hooks_ipv4[NF_INET_POST_ROUTING] :
				net->nf.hooks_ipv6[NF_INET_POST_ROUTING]);
	}
	if (hook == NF_INET_LOCAL_OUT)
		return false;
	return first_hook_in_use(net, pf, local);
}

#endif
