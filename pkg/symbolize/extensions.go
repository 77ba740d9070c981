package symbolize

import "encoding/binary"

// What Walk knows of the kernel's extensions. An extension that is not listed
// here may do anything.

type targetEnds uint8

const (
	endsMaybe   targetEnds = iota // XT_CONTINUE or a verdict, by the packet
	endsAlways                    // never XT_CONTINUE
	endsNever                     // always XT_CONTINUE
	endsFailing                   // XT_CONTINUE, or NF_DROP where the packet cannot be changed
)

// targetEnd lists the targets in net/netfilter/xt_*.c, net/ipv4/netfilter/ipt_*.c
// and net/ipv6/netfilter/ip6t_*.c of whose return value something is known.
// SYNPROXY, which decides by the packet, is none of them.
var targetEnd = map[string]targetEnds{
	"ERROR": endsAlways, "REJECT": endsAlways, "DNAT": endsAlways, "SNAT": endsAlways,
	"MASQUERADE": endsAlways, "REDIRECT": endsAlways, "NETMAP": endsAlways,
	"NFQUEUE": endsAlways, "TPROXY": endsAlways,

	"AUDIT": endsNever, "CLASSIFY": endsNever, "CONNMARK": endsNever, "CONNSECMARK": endsNever,
	"CT": endsNever, "HMARK": endsNever, "IDLETIMER": endsNever, "LED": endsNever, "LOG": endsNever,
	"MARK": endsNever, "NFLOG": endsNever, "NOTRACK": endsNever, "RATEEST": endsNever,
	"SECMARK": endsNever, "SET": endsNever, "TEE": endsNever, "TRACE": endsNever, "CHECKSUM": endsNever,

	"DNPT": endsFailing, "DSCP": endsFailing, "ECN": endsFailing, "HL": endsFailing, "SNPT": endsFailing,
	"TCPMSS": endsFailing, "TCPOPTSTRIP": endsFailing, "TOS": endsFailing, "TTL": endsFailing,
}

func endsOf(e *Entry) targetEnds {
	if e.Target == arpMangle && mangleVerdict(e) != xtContinue {
		return endsAlways
	}
	return targetEnd[e.Target]
}

// neverHotdrops lists the matches of the kernel that never set hotdrop.
var neverHotdrops = map[string]bool{
	"addrtype": true, "bpf": true, "cgroup": true, "cluster": true, "comment": true, "connbytes": true,
	"connlabel": true, "connmark": true, "conntrack": true, "cpu": true, "devgroup": true, "dscp": true,
	"ecn": true, "helper": true, "hl": true, "iprange": true, "ipvs": true, "l2tp": true, "length": true,
	"limit": true, "mac": true, "mark": true, "nfacct": true, "osf": true, "owner": true, "physdev": true,
	"pkttype": true, "policy": true, "quota": true, "rateest": true, "realm": true, "rpfilter": true,
	"set": true, "socket": true, "srh": true, "state": true, "statistic": true, "string": true,
	"time": true, "tos": true, "ttl": true,
}

// hotdropsAndFails lists the matches that fail whenever they set hotdrop, so
// that the rule's counter does not grow. (xt_dccp and xt_sctp can set hotdrop
// and, inverted, match; so can xt_recent, with --set and no memory.)
var hotdropsAndFails = map[string]bool{
	"ah": true, "connlimit": true, "dst": true, "esp": true, "eui64": true, "frag": true,
	"hashlimit": true, "hbh": true, "icmp": true, "icmp6": true, "ipcomp": true, "ipv6header": true,
	"mh": true, "multiport": true, "rt": true, "tcp": true, "tcpmss": true, "u32": true,
	"udp": true, "udplite": true,
}

// canHotdrop reports that looking at e's conditions can end the run.
func canHotdrop(f Family, e *Entry) bool {
	if f == ARP {
		return false // arp_tables.c looks at no matches
	}
	if f == IPv6 && e.Header.Flags&ip6FlagProto != 0 {
		return true // ip6_tables.c:ip6_packet_match: extension headers cut short
	}
	for i := range e.Matches {
		if !neverHotdrops[e.Matches[i].Name] {
			return true
		}
	}
	return false
}

// hotdropWhileMatching reports that e can match, count, and end the run all
// the same.
func hotdropWhileMatching(e *Entry) bool {
	for i := range e.Matches {
		if n := e.Matches[i].Name; !neverHotdrops[n] && !hotdropsAndFails[n] {
			return true
		}
	}
	return false
}

// stability tells which conditions cannot change during one run: they look
// at nothing but headers and devices of the packet, and no target that was
// run rewrites those.
type stability struct {
	headers bool // addresses, ports and the like stay
	ct      bool // the conntrack entry stays
}

// leavesHeaders lists the targets after which every condition in
// stableMatches has the same outcome as before. Targets that always end the
// run need not be here.
var leavesHeaders = map[string]bool{
	"AUDIT": true, "CHECKSUM": true, "CLASSIFY": true, "CONNMARK": true, "CONNSECMARK": true, "CT": true,
	"DSCP": true, "HL": true, "HMARK": true, "IDLETIMER": true, "LED": true, "LOG": true, "MARK": true,
	"NFLOG": true, "NOTRACK": true, "RATEEST": true, "SECMARK": true, "SET": true, "SYNPROXY": true,
	"TEE": true, "TOS": true, "TRACE": true, "TTL": true,
}

var stableMatches = map[string]bool{
	"ah": true, "comment": true, "esp": true, "icmp": true, "icmp6": true, "iprange": true, "mac": true,
	"multiport": true, "physdev": true, "pkttype": true, "sctp": true, "tcp": true, "udp": true, "udplite": true,
}

func newStability(t *Table, hits []whit) stability {
	s := stability{headers: true, ct: true}
	for i := range hits {
		e := &t.Entries[hits[i].index]
		if e.Kind != TargetExtension || endsOf(e) == endsAlways {
			continue
		}
		if !leavesHeaders[e.Target] {
			s.headers = false
		}
		if e.Target == "CT" || e.Target == "NOTRACK" || e.Target == "SYNPROXY" || !leavesHeaders[e.Target] {
			s.ct = false
		}
	}
	return s
}

// sticky reports that e, which matched once in this run, matched whenever the
// run came to it.
func (s stability) sticky(e *Entry) bool {
	if !s.headers {
		return false
	}
	for i := range e.Matches {
		m := &e.Matches[i]
		switch {
		case stableMatches[m.Name]:
		case m.Name == "state" && s.ct:
		case m.Name == "conntrack" && s.ct && stableConntrack(m):
		default:
			return false
		}
	}
	return true
}

// Offsets in struct xt_conntrack_mtinfo1, 2 and 3
// (include/uapi/linux/netfilter/xt_conntrack.h) and bits of match_flags.
const (
	ctMatchFlags  = 146
	ctInvertFlags = 148
	ctStateMask   = 150

	ctState      = 1 << 0
	ctStatus     = 1 << 6
	ctExpires    = 1 << 7
	ctStateAlias = 1 << 13
)

// stableConntrack reports that a conntrack match looks at nothing that another
// CPU may change meanwhile (an entry's status and timeout).
func stableConntrack(m *Match) bool {
	if m.Revision < 1 || m.Revision > 3 || len(m.Data) < ctStateMask {
		return false
	}
	return binary.NativeEndian.Uint16(m.Data[ctMatchFlags:])&(ctStatus|ctExpires) == 0
}
