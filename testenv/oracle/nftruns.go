package oracle

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

// An NFTRun is one packet's way through one base chain, as nftrace has it: a step.
type NFTRun struct {
	Family, Table, Chain string // of the table; the base chain
	Compat               bool
	PF, Hook             string // where it ran: "ip", "FORWARD"
	In, Out              int    // interface indexes
	Verdict              string
	Rules                []NFTRule
	Packet               NFTPacket
	// Unresolved is why the tool does not know the rules.
	Unresolved string
}

// NFTRule is one line of a run.
type NFTRule struct {
	Trace    string // "inet:filter:forward:rule:3"
	Chain    string
	Type     string // "rule", "return", "policy"
	Number   int
	Handle   uint64
	IsPolicy bool
	IsEnd    bool
	Action   string
	Depth    int
}

// NFTPacket is what is known of a packet.
type NFTPacket struct {
	// Key is what both the kernel's trace and nftrace's JSON say of it. NAT changes it.
	Key string
	// Identity is what only the kernel's trace says, and nothing changes but
	// reassembly: IPv4's ID, TCP's numbers. Empty for a fragment.
	Identity string
}

// nftHookFamily is the family of the hook itself: ingress is a device's. For chains of inet there
// the kernel tells of the packet's.
func nftHookFamily(pf uint8, hook string) string {
	if hook == "INGRESS" {
		return "netdev"
	}
	return nftFamily(pf)
}

// Runs puts events together to runs, in the order of their first events.
func (rs *NFTRuleset) Runs(events []NFTEvent) ([]NFTRun, error) {
	var runs []*nftRunning
	open := map[uint32]*nftRunning{}
	for i, e := range events {
		r := open[e.ID]
		begins := e.Network != nil || e.In != 0 || e.Out != 0
		switch {
		case begins && r != nil:
			return nil, fmt.Errorf("oracle: message %d begins chain %s, and the same packet's %s has not ended", i, e.Chain, r.run.Chain)
		case !begins && r == nil:
			return nil, fmt.Errorf("oracle: message %d in chain %s belongs to no packet: %+v", i, e.Chain, e)
		case begins:
			c := rs.chains[nftChainKey{e.Family, e.Table, e.Chain}]
			if c == nil || c.hook == "" {
				return nil, fmt.Errorf("oracle: message %d begins with chain %s %s %s, which is not a base chain: %+v", i, e.Family, e.Table, e.Chain, e)
			}
			r = &nftRunning{run: NFTRun{
				Family: e.Family, Table: e.Table, Chain: e.Chain, Compat: rs.Compat[e.Family+" "+e.Table],
				PF: nftHookFamily(e.PF, c.hook), Hook: c.hook, In: int(e.In), Out: int(e.Out),
				Packet: nftPacket(e.Network, e.Transport),
			}}
			open[e.ID] = r
			runs = append(runs, r)
		}
		if e.Family != r.run.Family || e.Table != r.run.Table {
			return nil, fmt.Errorf("oracle: message %d is of table %s %s, within %s %s", i, e.Family, e.Table, r.run.Family, r.run.Table)
		}
		if err := r.add(rs, e); err != nil {
			return nil, fmt.Errorf("oracle: message %d: %w: %+v", i, err, e)
		}
		if r.run.Verdict != "" {
			delete(open, e.ID)
		}
	}
	for _, r := range open {
		return nil, fmt.Errorf("oracle: the last of chain %s is missing: %+v", r.run.Chain, r.run.Rules)
	}
	var out []NFTRun
	for _, r := range runs {
		out = append(out, r.run)
	}
	return out, nil
}

type nftRunning struct {
	run   NFTRun
	depth int
	jumps []int // the depths that the ends of chains lead back to
}

// add makes a line of an event, or none.
func (r *nftRunning) add(rs *NFTRuleset, e NFTEvent) error {
	c := rs.chains[nftChainKey{e.Family, e.Table, e.Chain}]
	if c == nil {
		return fmt.Errorf("no chain %s", e.Chain)
	}
	line := NFTRule{Chain: e.Chain, Handle: e.Handle, Type: "rule", Depth: r.depth}
	switch {
	case e.Type == traceTypePolicy:
		line.Type, line.IsPolicy, line.Number, line.Handle, line.Depth = "policy", true, c.rules+1, 0, 0
		line.Action = verdictName(int32(e.Policy))
		r.run.Verdict = line.Action
	case e.Handle == 0:
		// The end of a chain: a return on 6.1, a rule without a handle on 6.12.
		if e.Code != unix.NFT_CONTINUE {
			return fmt.Errorf("verdict %d, and no rule", e.Code)
		}
		r.back()
		if c.hook != "" {
			return nil // the policy follows
		}
		line.Type, line.IsEnd, line.Number, line.Action = "return", true, c.rules+1, "RETURN"
	default:
		rule := rs.rules[nftRuleKey{e.Family, e.Table, e.Handle}]
		if rule == nil || rule.chain != e.Chain {
			return fmt.Errorf("chain %s has no rule with handle %d", e.Chain, e.Handle)
		}
		line.Number = rule.number
		switch e.Code {
		case unix.NFT_CONTINUE:
			line.Action = "continue"
		case unix.NFT_JUMP:
			line.Action = "jump " + e.Target
			r.jumps = append(r.jumps, r.depth)
			r.depth++
		case unix.NFT_GOTO:
			line.Action = "goto " + e.Target
			r.depth++
		case unix.NFT_RETURN:
			line.Action = "RETURN"
			r.back()
		default:
			line.Action = verdictName(e.Code)
			r.run.Verdict = line.Action
		}
		// net/ipv4/netfilter/ip_tables.c:get_chainname_rulenum
		if r.run.Compat && rule.always && (r.run.Verdict != "" || e.Code == unix.NFT_RETURN) {
			line.Type = "return"
			if c.hook != "" {
				line.Type = "policy"
			}
		}
	}
	line.Trace = fmt.Sprintf("%s:%s:%s:%d", e.Table, line.Chain, line.Type, line.Number)
	if !r.run.Compat {
		line.Trace = e.Family + ":" + line.Trace
	}
	r.run.Rules = append(r.run.Rules, line)
	return nil
}

// back goes where the end of a chain leads.
func (r *nftRunning) back() {
	r.depth = 0
	if n := len(r.jumps); n > 0 {
		r.depth, r.jumps = r.jumps[n-1], r.jumps[:n-1]
	}
}

func verdictName(code int32) string {
	// The upper half of NF_QUEUE's is the queue's number and flags.
	names := []string{"DROP", "ACCEPT", "STOLEN", "QUEUE", "REPEAT"}
	if n := int(code & 0xff); (code >= 0 || code < unix.NFT_RETURN) && n < len(names) {
		return names[n]
	}
	return fmt.Sprintf("verdict %d", code)
}

// nftHead is what Key is made of.
type nftHead struct {
	family             string // "ip", "ip6" or ""
	src, dst           string
	length             int
	proto              int // -1 if unknown
	fragment           bool
	fragOff            int // only IPv4's trace has it
	sport, dport       int
	flags              string // of TCP
	icmp               bool
	icmpType, icmpCode int
	ports              bool
}

func (h *nftHead) key() string {
	var b strings.Builder
	switch {
	case h.family == "":
		return "not IP"
	case h.family == "ip6" && h.fragment:
		return fmt.Sprintf("ip6 fragment, %d bytes", h.length) // see nftPacket
	}
	fmt.Fprintf(&b, "%s %s > %s, %d bytes", h.family, h.src, h.dst, h.length)
	if h.fragment {
		fmt.Fprintf(&b, ", fragment at %d", h.fragOff)
		return b.String()
	}
	fmt.Fprintf(&b, ", protocol %d", h.proto)
	if h.ports {
		fmt.Fprintf(&b, ", ports %d > %d", h.sport, h.dport)
	}
	if h.flags != "" {
		fmt.Fprintf(&b, ", %s", h.flags)
	}
	if h.icmp {
		fmt.Fprintf(&b, ", type %d code %d", h.icmpType, h.icmpCode)
	}
	return b.String()
}

// nftReport is the key of multicast reports (MLD), which the kernel sends when it likes.
const nftReport = "multicast report"

// tcpFlagNames are those that no rule of a test changes.
var tcpFlagNames = []string{"FIN", "SYN", "RST", "PSH", "ACK"}

// nftPacket reads the headers that come with the trace.
func nftPacket(network, transport []byte) NFTPacket {
	var h nftHead
	var id string
	u16 := binary.BigEndian.Uint16
	// Of an IPv6 fragment that is not the first the kernel takes the beginning for the
	// transport header (ipv6_find_hdr gives no offset), so that 20 bytes are all there is.
	if len(network) == 0 && len(transport) == 20 && transport[0]>>4 == 6 && transport[6] == unix.IPPROTO_FRAGMENT {
		h.family, h.fragment, h.length = "ip6", true, 40+int(u16(transport[4:]))
		return NFTPacket{Key: h.key()}
	}
	switch {
	case len(network) >= 20 && network[0]>>4 == 4:
		h.family, h.length, h.proto = "ip", int(u16(network[2:])), int(network[9])
		off := u16(network[6:])
		h.fragment, h.fragOff = off&0x3fff != 0, int(off&0x1fff)*8
		src, _ := netip.AddrFromSlice(network[12:16])
		dst, _ := netip.AddrFromSlice(network[16:20])
		h.src, h.dst = src.String(), dst.String()
		id = fmt.Sprintf("id %d", u16(network[4:]))
	case len(network) >= 40 && network[0]>>4 == 6:
		h.family, h.length, h.proto = "ip6", 40+int(u16(network[4:])), int(network[6])
		h.fragment = h.proto == unix.IPPROTO_FRAGMENT
		src, _ := netip.AddrFromSlice(network[8:24])
		dst, _ := netip.AddrFromSlice(network[24:40])
		h.src, h.dst = src.String(), dst.String()
		id = fmt.Sprintf("flow label %x", binary.BigEndian.Uint32(network)&0xfffff)
	default:
		return NFTPacket{Key: h.key()}
	}
	switch {
	case h.fragment:
		return NFTPacket{Key: h.key()}
	case h.family == "ip6" && h.proto == unix.IPPROTO_HOPOPTS:
		return NFTPacket{Key: nftReport} // nothing else has such options here
	}
	id = fmt.Sprintf("%s, protocol %d", id, h.proto)
	if h.proto != unix.IPPROTO_TCP { // TCPMSS adds an option
		id = fmt.Sprintf("%s, %d bytes", id, h.length)
	}
	t := transport
	switch {
	case h.proto == unix.IPPROTO_TCP && len(t) >= 14:
		h.ports, h.sport, h.dport = true, int(u16(t)), int(u16(t[2:]))
		var flags []string
		for i, name := range tcpFlagNames {
			if t[13]>>i&1 != 0 {
				flags = append(flags, name)
			}
		}
		h.flags = strings.Join(flags, ",")
		id = fmt.Sprintf("%s, seq %d, ack %d, %s", id, binary.BigEndian.Uint32(t[4:]), binary.BigEndian.Uint32(t[8:]), h.flags)
	case h.proto == unix.IPPROTO_UDP && len(t) >= 4:
		h.ports, h.sport, h.dport = true, int(u16(t)), int(u16(t[2:]))
	case (h.proto == unix.IPPROTO_ICMP || h.proto == unix.IPPROTO_ICMPV6) && len(t) >= 8:
		h.icmp, h.icmpType, h.icmpCode = true, int(t[0]), int(t[1])
		id = fmt.Sprintf("%s, type %d, code %d, seq %d", id, t[0], t[1], u16(t[6:]))
	}
	return NFTPacket{Key: h.key(), Identity: id}
}
