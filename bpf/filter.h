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
	key.netns = get(net, ns.inum);
	key.ifindex = get(dev, ifindex);
	return bpf_map_lookup_elem(&filter_ifaces, &key);
}

/* Whether it is worth to look an interface up: false for most that are not asked for. */
static __always_inline bool may_match_iface(struct net_device *dev)
{
	return dev && iface_bits >> ((u32)get(dev, ifindex) % 64) & 1;
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

static __always_inline bool match_netns(struct net *net)
{
	u32 netns = get(net, ns.inum);

	return use_netns && bpf_map_lookup_elem(&filter_netns, &netns);
}

static __always_inline u32 netns_of(struct nf_hook_state *state)
{
	struct net *net = get(state, net);

	return get(net, ns.inum);
}

static __always_inline bool match_places(struct nf_hook_state *state)
{
	if (match_netns(get(state, net)))
		return true;
	return use_ifaces && (match_iface(get(state, net), get(state, in)) ||
			      match_iface(get(state, net), get(state, out)));
}

/* Sent by this host, and not yet received by anybody (skb->skb_iif is 0). */
static __always_inline bool is_local(struct sk_buff *skb)
{
	return !get(skb, skb_iif);
}

/* The family of the IP hooks for a packet; 0: neither IPv4 nor IPv6. */
static __always_inline u8 ip_family(struct sk_buff *skb)
{
	u16 protocol = get(skb, protocol);

	if (protocol == bpf_htons(ETH_P_IP))
		return NFPROTO_IPV4;
	return protocol == bpf_htons(ETH_P_IPV6) ? NFPROTO_IPV6 : 0;
}

/*
 * Whether anything is registered at a family's PREROUTING (or OUTPUT): then all packets
 * that were received (or sent) pass nf_hook_slow there (include/net/netns/netfilter.h).
 */
static __always_inline bool first_hook_in_use(struct net *net, u8 pf, bool sent)
{
	if (pf == NFPROTO_IPV4)
		return sent ? get(net, nf.hooks_ipv4[NF_INET_LOCAL_OUT]) :
			      get(net, nf.hooks_ipv4[NF_INET_PRE_ROUTING]);
	if (pf == NFPROTO_IPV6)
		return sent ? get(net, nf.hooks_ipv6[NF_INET_LOCAL_OUT]) :
			      get(net, nf.hooks_ipv6[NF_INET_PRE_ROUTING]);
	if (pf == NFPROTO_BRIDGE && bpf_core_field_exists(net->nf.hooks_bridge))
		return sent ? get(net, nf.hooks_bridge[NF_INET_LOCAL_OUT]) :
			      get(net, nf.hooks_bridge[NF_INET_PRE_ROUTING]);
	return false;
}

/*
 * Whether a packet at PREROUTING has been there before: br_netfilter leads it through while
 * it is in the bridge, and if it is for the host, it comes again.
 */
static __always_inline bool came_up_bridge(struct sk_buff *skb)
{
	u64 nb = bridge_info(skb);

	return nb && !in_prerouting((void *)nb);
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
	u8 pf = get(state, pf), hook = get(state, hook);

	/* Without a filter it is a copy of a packet that is followed. */
	if (!use_filter)
		return false;
	if (hook == NF_INET_LOCAL_OUT)
		return false;
	/* A clone (of a packet that is flooded) has passed no hook itself. */
	if (get_bits(skb, cloned))
		return false;
	if (pf == NFPROTO_BRIDGE) {
		/*
		 * At the bridge's own PREROUTING packets are looked at only if a
		 * ruleset is there; br_netfilter brings those back that IP's saw.
		 */
		if (from_br_netfilter(skb))
			return true;
		return hook == NF_INET_POST_ROUTING && !is_local(skb);
	}
	if (hook == NF_INET_PRE_ROUTING)
		return came_up_bridge(skb);
	if (use_later && use_detail)
		return false;
	return first_hook_in_use(get(state, net), pf, is_local(skb));
}

/* ---- flows that nobody asked for ---- */

/*
 * How long a flow is left alone, in ticks of the kernel's clock, which cost next to nothing
 * to read: about a second with 250 of them in one (CONFIG_HZ), a quarter with 1,000.
 */
#define OTHER_FLOW_TICKS 256

static __always_inline u64 flow_mix(u64 h, u64 v)
{
	/* The multiplier of Knuth's 64-bit generator (MMIX). */
	h = (h ^ v) * 6364136223846793005ULL;
	return h ^ h >> 29;
}

/*
 * A hash of what a flow is known by at a hook: begun with this, mixed with the addresses,
 * and ended with the ports as they stand in the packet. Two flows of a second that share
 * all 64 bits are not told apart; then one of them is followed from further on.
 */
static __always_inline u64 flow_begin(u32 netns, u8 proto)
{
	return (u64)netns << 8 | proto;
}

static __always_inline u64 flow_end(u64 h, u32 ports)
{
	h = flow_mix(h, ports);
	return h ^ h >> 32;
}

static __always_inline u64 flow_of_tuple(const struct pkt_tuple *t, u32 netns)
{
	const u64 *s = (const u64 *)t->saddr, *d = (const u64 *)t->daddr;
	u32 ports = bpf_htons(t->sport) | (u32)bpf_htons(t->dport) << 16;
	u64 h;

	/* Of later fragments nobody knows the ports. */
	if (t->frag_off)
		ports = ~0;
	h = flow_begin(netns, t->nexthdr);
	if (t->flags & TUPLE_VLAN)
		h ^= (u64)(t->vlan + 1) << 40;
	if (t->ethertype == ETH_P_IP)
		return flow_end(flow_mix(h, (u32)s[0] | d[0] << 32), ports);
	h = flow_mix(flow_mix(h, s[0]), s[1]);
	return flow_end(flow_mix(flow_mix(h, d[0]), d[1]), ports);
}

static __always_inline bool has_ports(u8 proto)
{
	return proto == IPPROTO_UDP || proto == IPPROTO_TCP ||
	       proto == IPPROTO_SCTP;
}

/*
 * The same hash from the packet itself, which costs less. 0: not from this one (fragments,
 * options, VLAN tags, headers that are not in one piece).
 */
static __always_inline u64 flow_of_packet(struct sk_buff *skb, u32 netns, u8 pf)
{
	u32 nh = get(skb, network_header);
	u64 at = number(get(skb, head)) + nh;
	struct words w;
	u8 proto;
	u64 h;

	/* IPv4 without options, or IPv6, and the ports. */
	if (get(skb, tail) < nh + (pf == NFPROTO_IPV4 ? 24 : 44) ||
	    vlan_of(skb) || !read_words(&w, (void *)at))
		return 0;
	if (pf == NFPROTO_IPV4) {
		/* Version and IHL; more fragments, or an offset. */
		if ((w.a & 0xff) != 0x45 || w.a >> 48 & bpf_htons(0x3fff))
			return 0;
		proto = w.b >> 8;
		h = flow_begin(netns, proto);
		return flow_end(flow_mix(h, w.b >> 32 | w.c << 32),
				has_ports(proto) ? w.c >> 32 : 0);
	}
	proto = w.a >> 48;
	if (pf != NFPROTO_IPV6 || proto == IPPROTO_FRAG)
		return 0;
	h = flow_mix(flow_mix(flow_begin(netns, proto), w.b), w.c);
	if (!read_words(&w, (void *)(at + 24)))
		return 0;
	return flow_end(flow_mix(flow_mix(h, w.a), w.b),
			has_ports(proto) ? w.c : 0);
}

static __always_inline struct other_flow *other_flow(u64 hash)
{
	u32 key = hash % OTHER_FLOWS;

	return bpf_map_lookup_elem(&other_flows, &key);
}

/* Whether a flow is to be left alone. */
static __always_inline bool is_other_flow(u64 hash)
{
	struct other_flow *other = other_flow(hash);

	return other && other->hash == hash &&
	       bpf_jiffies64() - other->when < OTHER_FLOW_TICKS;
}

static __always_inline void leave_alone(u64 hash)
{
	struct other_flow *other = other_flow(hash);

	if (other) {
		other->when = bpf_jiffies64();
		other->hash = hash;
	}
}

/*
 * The packet of each CPU that was last looked at, at a first hook, and is not followed.
 * With more CPUs those behind the last do without.
 */
#define PASSED_CPUS 512

struct passed {
	u64 skb;
	u64 net; /* struct net * */
	u8 hook; /* PREROUTING or OUTPUT */
	u8 pf;
	u64 call; /* see seen_call() */
} __attribute__((aligned(64)));

struct passed passed[PASSED_CPUS] = {};

/* What other families count so are other hooks. */
static __always_inline bool is_first_hook(u8 hook, u8 pf)
{
	return (hook == NF_INET_PRE_ROUTING || hook == NF_INET_LOCAL_OUT) &&
	       (pf == NFPROTO_IPV4 || pf == NFPROTO_IPV6);
}

static __always_inline void let_pass(struct sk_buff *skb, struct net *net,
				     u8 hook, u8 pf)
{
	u32 cpu = bpf_get_smp_processor_id();

	if (is_first_hook(hook, pf) && cpu < PASSED_CPUS) {
		passed[cpu].skb = (u64)skb;
		passed[cpu].net = (u64)net;
		passed[cpu].hook = hook;
		passed[cpu].pf = pf;
	}
}

/*
 * Whether a packet at a hook is the one that was let pass at the first one of this
 * namespace, and not another one at its address. If the other is of the same kind (received
 * or sent, IPv4 or IPv6), it was at that first hook since, and looked at; if not, its kind's
 * first hook may not be in use, and nobody has seen it.
 */
static __always_inline bool has_passed(const struct passed *p,
				       struct sk_buff *skb,
				       struct nf_hook_state *state)
{
	u8 hook = get(state, hook), pf = get(state, pf);
	bool sent = p->hook == NF_INET_LOCAL_OUT;

	if (pf == NFPROTO_BRIDGE) {
		/* seen_before() says the same. */
		if (from_br_netfilter(skb))
			return true;
		/* What this host sends went through IP's hooks. */
		return sent && is_local(skb) && ip_family(skb) == p->pf;
	}
	if (hook == NF_INET_LOCAL_OUT || pf != p->pf)
		return false;
	if (hook == NF_INET_POST_ROUTING)
		return is_local(skb) == sent;
	if (sent)
		return false;
	return hook != NF_INET_PRE_ROUTING || came_up_bridge(skb);
}

/* Whether the flow of a packet is to be left alone. */
static __noinline bool flow_passes(struct sk_buff *skb,
				   struct nf_hook_state *state, u8 hook)
{
	struct net *net = get(state, net);
	u8 pf = get(state, pf);
	u64 flow;

	/* Two packets of a flow may differ for such a filter. */
	if (!use_filter || use_detail)
		return false;
	if (use_ifaces && (may_match_iface(get(state, in)) ||
			   may_match_iface(get(state, out))))
		return false;
	flow = flow_of_packet(skb, get(net, ns.inum), pf);
	if (!flow || !is_other_flow(flow))
		return false;
	let_pass(skb, net, hook, pf);
	return true;
}

/*
 * Whether a packet is none of our business, found out as cheaply as can be, for all packets
 * of the host come here: it has passed this namespace's first hook, or its flow is known.
 * Nothing is followed when this is asked. false: seen_before() and match() are to look.
 */
static __always_inline bool passes(struct sk_buff *skb,
				   struct nf_hook_state *state)
{
	u32 cpu = bpf_get_smp_processor_id();

	if (!use_filter)
		return false;
	if (cpu < PASSED_CPUS && passed[cpu].skb == (u64)skb &&
	    passed[cpu].net == (u64)get(state, net) &&
	    has_passed(&passed[cpu], skb, state))
		return true;
	return flow_passes(skb, state, get(state, hook));
}

/*
 * Copies of the probe of nf_hook_slow, for which see hook_enter: the nth one of a call asks
 * whether the one before it has seen to the call, which sp names. If that was skipped, or
 * anybody else came to this CPU in between, the answer is false, and the work is done or found
 * done already. The last copy leaves nothing that could be taken for another call.
 */
static __always_inline bool seen_call(u64 sp, const u32 nth)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct passed *p = &passed[bounded(cpu, PASSED_CPUS - 1)];
	u64 had = p->call;

	if (cpu >= PASSED_CPUS)
		return false;
	p->call = nth == hook_copies ? 0 : sp + nth;
	return nth > 1 && had == sp + nth - 1;
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
	u32 flags; /* REC_F_LATE, REC_F_REINJECTED */
	u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 4);
	__type(key, u32);
	__type(value, struct decision);
} decisions SEC(".maps");

/*
 * Whether to follow a packet that is at a hook. One that does not match may do so
 * later: behind the next interface, in the next namespace, or when NAT has changed
 * its addresses; and then its whole path is wanted. So the first packet of a flow is
 * followed tentatively from its first hook on. If the filter never matched it,
 * packets of the same flow are left alone for a while (other_flows).
 */
static __noinline int match(struct sk_buff *skb, struct nf_hook_state *state,
			    u8 hook, struct decision *d)
{
	struct pkt_tuple t = {};
	bool place, maybe, expr = true;

	d->match = MATCH_NO;
	d->flow = 0;
	place = !use_places || match_places(state);
	if (!use_expr && !use_addrs && place) {
		d->match = MATCH_YES;
		return 0;
	}
	/* It may match later only if nobody has followed its flow from here to see. */
	maybe = is_local(skb) ||
		(hook == NF_INET_PRE_ROUTING && !came_up_bridge(skb));
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

	/* The addresses in ARP stay what they are, but it goes on to other devices. */
	if (!maybe || (t.ethertype != ETH_P_IP && t.ethertype != ETH_P_IPV6 &&
		       (t.ethertype != ETH_P_ARP || !expr)))
		return 0;
	d->flow = flow_of_tuple(&t, netns_of(state));
	if (!expr && !use_later) {
		leave_alone(d->flow);
		return 0;
	}
	if (is_other_flow(d->flow))
		return 0;
	d->match = MATCH_MAYBE;
	return 0;
}

/* Whether a packet that is handed to a device, or was received from it, matches there. */
static __noinline int match_dev(struct sk_buff *skb, struct net_device *dev)
{
	struct pkt_tuple t = {};
	struct net *net = get(dev, nd_net.net);

	if (use_places && !match_netns(net) &&
	    !(use_ifaces && match_iface(net, dev)))
		return false;
	if (!use_expr)
		return true;
	parse_tuple(&t, skb);
	return filter_expr(&t);
}

static __always_inline bool is_fragment(struct sk_buff *skb)
{
	u64 l3 = number(get(skb, head)) + get(skb, network_header);
	u16 frag_off = 0;
	u8 nexthdr = 0;

	if (get(skb, protocol) == bpf_htons(ETH_P_IPV6)) {
		bpf_probe_read_kernel(&nexthdr, sizeof(nexthdr),
				      (void *)(l3 + 6));
		return nexthdr == IPPROTO_FRAG;
	}
	bpf_probe_read_kernel(&frag_off, sizeof(frag_off), (void *)(l3 + 6));
	return frag_off & bpf_htons(0x3fff); /* more fragments, or an offset */
}

/*
 * Whether a packet that matches here for the first time has passed a hook of this
 * namespace before, at which it did not match.
 */
static __always_inline bool matched_late(struct sk_buff *skb,
					 struct nf_hook_state *state)
{
	struct net *net = get(state, net);
	u8 pf = get(state, pf), hook = get(state, hook);
	bool local = is_local(skb);

	if ((!use_places && !use_expr) || hook == NF_INET_PRE_ROUTING)
		return false;
	/* br_netfilter leads no ARP through the first hooks. */
	if (pf == NFPROTO_BRIDGE && get(skb, protocol) == bpf_htons(ETH_P_ARP))
		return false;
	/* A piece of a packet that had to be cut behind the rules begins here. */
	if (pf == NFPROTO_BRIDGE && local && is_fragment(skb))
		return false;
	if (pf == NFPROTO_BRIDGE && local) {
		/* Sent by this host through a bridge: the IP hooks came first. */
		pf = get(skb, protocol) == bpf_htons(ETH_P_IPV6) ?
			     NFPROTO_IPV6 :
			     NFPROTO_IPV4;
		return first_hook_in_use(net, pf, true) ||
		       (pf == NFPROTO_IPV4 ?
				get(net, nf.hooks_ipv4[NF_INET_POST_ROUTING]) :
				get(net, nf.hooks_ipv6[NF_INET_POST_ROUTING]));
	}
	if (hook == NF_INET_LOCAL_OUT)
		return false;
	return first_hook_in_use(net, pf, local);
}

#endif
