package render

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/nftrace/nftrace/pkg/events"
)

// head is what people ask of a packet, as far as its captured bytes tell.
type head struct {
	ip       bool // the network header was there
	src, dst netip.Addr
	ttl      int
	proto    int // the transport protocol, -1 where it is not known
	frag     bool
	fragOff  int // in bytes; the transport header is in the fragment at 0
	l4       []byte
	// short says that bytes were missed which the packet has and the
	// capture has not; broken, that the packet itself ends too early.
	short, broken bool
}

// bytes returns data[off:off+n], or nil, and says why.
func (h *head) bytes(data []byte, total, off, n int) []byte {
	switch {
	case off+n > total:
		h.broken = true
		return nil
	case off+n > len(data):
		h.short = true
		return nil
	}
	return data[off : off+n]
}

func parseHead(p *events.Packet) head {
	h := head{proto: -1, ttl: -1}
	total := max(p.Len, 0)
	data := p.Data[:min(len(p.Data), total)]
	switch {
	case p.Family == events.PFIPv4, p.Family == 0 && p.EtherType == 0x0800:
		h.parse4(data, total)
	case p.Family == events.PFIPv6, p.Family == 0 && p.EtherType == 0x86dd:
		h.parse6(data, total)
	}
	return h
}

func (h *head) parse4(data []byte, total int) {
	b := h.bytes(data, total, 0, 20)
	if b == nil {
		return
	}
	h.ip = true
	h.src, h.dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	h.ttl, h.proto = int(b[8]), int(b[9])
	off := be16(b, 6)
	h.fragOff = int(off&0x1fff) * 8
	h.frag = off&0x3fff != 0
	ihl := int(b[0]&15) * 4
	if ihl < 20 {
		h.broken = true
		return
	}
	h.transport(data, total, ihl)
}

func (h *head) parse6(data []byte, total int) {
	b := h.bytes(data, total, 0, 40)
	if b == nil {
		return
	}
	h.ip = true
	h.src, h.dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	h.ttl = int(b[7])
	next, off := b[6], 40
	for h.fragOff == 0 {
		switch next {
		case protoHopOpts, protoRouting, protoDstOpts, protoFragment, protoAH:
		default:
			h.proto = int(next)
			h.transport(data, total, off)
			return
		}
		e := h.bytes(data, total, off, 8)
		if e == nil {
			return
		}
		switch next {
		case protoFragment:
			h.frag = be16(e, 2)&0xfff9 != 0 // else it is whole (RFC 6946)
			h.fragOff = int(be16(e, 2) &^ 7)
			off += 8
		case protoAH:
			off += (int(e[1]) + 2) << 2
		default:
			off += (int(e[1]) + 1) << 3
		}
		next = e[0]
	}
	h.proto = int(next)
}

// minHeader is how much of a transport header is needed to say anything.
func minHeader(proto int) int {
	switch proto {
	case protoTCP:
		return 20
	case protoUDP, protoUDPLite, protoICMP, protoICMPv6:
		return 8
	case protoSCTP, protoDCCP, protoESP:
		return 4
	case protoAH:
		return 8
	}
	return 0
}

func (h *head) transport(data []byte, total, off int) {
	if h.fragOff != 0 {
		return
	}
	// The packet in an ICMP error has 8 bytes of its transport header: enough for ports.
	if h.bytes(data, total, off, minHeader(h.proto)) != nil || h.proto == protoTCP {
		h.l4 = data[min(off, len(data)):]
	}
}

// ports are the transport ports, where the protocol has some and they are known.
func (h *head) ports() (src, dst uint16, ok bool) {
	switch h.proto {
	case protoTCP, protoUDP, protoUDPLite, protoSCTP, protoDCCP:
		if len(h.l4) >= 4 {
			return be16(h.l4, 0), be16(h.l4, 2), true
		}
	}
	return 0, 0, false
}

var tcpFlagNames = [8]string{"FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"}

// tcpFlags are the flags set, SYN and ACK first as people say them.
func (h *head) tcpFlags() []string {
	flags := []string{}
	if h.proto != protoTCP || len(h.l4) < 14 {
		return flags
	}
	for _, i := range []int{1, 4, 0, 2, 3, 5, 6, 7} {
		if h.l4[13]&(1<<i) != 0 {
			flags = append(flags, tcpFlagNames[i])
		}
	}
	return flags
}

// icmp gives type and code of an ICMP or ICMPv6 message.
func (h *head) icmp() (typ, code byte, ok bool) {
	if (h.proto == protoICMP || h.proto == protoICMPv6) && len(h.l4) >= 8 {
		return h.l4[0], h.l4[1], true
	}
	return 0, 0, false
}

func (h *head) icmpError() bool {
	typ, _, ok := h.icmp()
	if !ok {
		return false
	}
	if h.proto == protoICMPv6 {
		return typ < 128
	}
	switch typ {
	case icmpDestUnreach, icmpSourceQuench, icmpRedirect, icmpTimeExceeded, icmpParameterProb:
		return true
	}
	return false
}

// Describe says in one line what p is: protocol, endpoints, and what tells it
// apart from its like. It holds no byte that a terminal would obey.
func Describe(p *events.Packet) string {
	h := parseHead(p)
	if h.ip {
		return h.describe(false)
	}
	if p.EtherType == 0x0806 || p.EtherType == 0x8035 {
		return describeARP(p)
	}
	what := "unknown packet" // the records that have it were lost
	switch {
	case p.EtherType == 0x0800 || p.Family == events.PFIPv4:
		what = "IPv4 packet"
	case p.EtherType == 0x86dd || p.Family == events.PFIPv6:
		what = "IPv6 packet"
	case p.EtherType >= 0x0600:
		what = fmt.Sprintf("ethertype 0x%04x", p.EtherType)
		if name := etherTypes[p.EtherType]; name != "" {
			what = name + " (" + what + ")"
		}
	case p.EtherType != 0: // ETH_P_802_3 and its like: no Ethernet II frame
		what = fmt.Sprintf("802.2 frame (protocol 0x%04x)", p.EtherType)
	}
	return what + h.defect()
}

func (h *head) defect() string {
	switch {
	case h.short:
		return " (header not captured)"
	case h.broken:
		return " (header cut short)"
	}
	return ""
}

var etherTypes = map[uint16]string{
	0x8100: "802.1Q VLAN", 0x88a8: "802.1ad VLAN", 0x8847: "MPLS", 0x8863: "PPPoE discovery",
	0x8864: "PPPoE session", 0x888e: "802.1X", 0x88cc: "LLDP", 0x88e5: "MACsec",
}

var protoNames = map[int]string{
	protoICMP: "ICMP", protoIGMP: "IGMP", protoIPIP: "IPv4-in-IP", protoTCP: "TCP", protoUDP: "UDP",
	protoDCCP: "DCCP", protoIPv6: "IPv6-in-IP", protoGRE: "GRE", protoESP: "ESP", protoAH: "AH",
	protoICMPv6: "ICMPv6", protoNone: "IPv6 without payload", protoOSPF: "OSPF", protoPIM: "PIM",
	protoVRRP: "VRRP", protoSCTP: "SCTP", protoUDPLite: "UDP-Lite",
}

func protoName(proto int) string {
	if n := protoNames[proto]; n != "" {
		return n
	}
	if proto < 0 {
		return "IP"
	}
	return "protocol " + strconv.Itoa(proto)
}

// fragment says which fragment the packet is; "" if it is whole.
func (h *head) fragment() string {
	switch {
	case !h.frag:
		return ""
	case h.fragOff == 0:
		return "first fragment"
	}
	return "fragment at offset " + strconv.Itoa(h.fragOff)
}

// ends are the packet's addresses, with its ports where it has some and they are known.
func (h *head) ends() string {
	if s, d, ok := h.ports(); ok {
		return netip.AddrPortFrom(h.src, s).String() + " → " + netip.AddrPortFrom(h.dst, d).String()
	}
	return h.src.String() + " → " + h.dst.String()
}

// known tells whether the packet is one of IP whose headers are there up to its protocol.
func (h *head) known() bool { return h.ip && h.proto >= 0 }

func (h *head) describe(inner bool) string {
	var b strings.Builder
	b.WriteString(protoName(h.proto) + " " + h.ends())
	if f := h.fragment(); f != "" {
		b.WriteString(" " + f)
	}
	if inner {
		return b.String()
	}
	if f := h.tcpFlags(); h.proto == protoTCP && len(h.l4) >= 14 {
		if len(f) == 0 {
			f = []string{"no flags"}
		}
		b.WriteString(" [" + strings.Join(f, ",") + "]")
	}
	if typ, code, ok := h.icmp(); ok {
		b.WriteByte(' ')
		if h.proto == protoICMP {
			b.WriteString(icmpText(typ, code, h.l4))
		} else {
			b.WriteString(icmp6Text(typ, code, h.l4))
		}
		if h.icmpError() {
			if in := h.embedded(); in.ip {
				b.WriteString(" (for " + in.describe(true) + ")")
			}
		}
	}
	switch {
	case h.proto == protoESP && len(h.l4) >= 4:
		fmt.Fprintf(&b, " spi 0x%x", be32(h.l4, 0))
	case h.proto == protoAH && len(h.l4) >= 8:
		fmt.Fprintf(&b, " spi 0x%x", be32(h.l4, 4))
	}
	b.WriteString(h.defect())
	return b.String()
}

// embedded is the packet that an ICMP error is about.
func (h *head) embedded() head {
	in := head{proto: -1, ttl: -1}
	data := h.l4[8:]
	if h.proto == protoICMPv6 {
		in.parse6(data, len(data))
	} else {
		in.parse4(data, len(data))
	}
	return in
}

var unreachText = [...]string{"network unreachable", "host unreachable", "protocol unreachable", "port unreachable",
	"fragmentation needed", "source route failed", "network unknown", "host unknown", "host isolated",
	"network prohibited", "host prohibited", "network unreachable for TOS", "host unreachable for TOS",
	"communication prohibited", "host precedence violation", "precedence cutoff"}

func icmpText(typ, code byte, b []byte) string {
	switch typ {
	case icmpEcho, icmpEchoReply:
		what := "echo request"
		if typ == icmpEchoReply {
			what = "echo reply"
		}
		return fmt.Sprintf("%s id %d seq %d", what, be16(b, 4), be16(b, 6))
	case icmpDestUnreach:
		if int(code) < len(unreachText) {
			if code == icmpFragNeeded {
				return fmt.Sprintf("fragmentation needed, mtu %d", be16(b, 6))
			}
			return unreachText[code]
		}
		return fmt.Sprintf("unreachable code %d", code)
	case icmpSourceQuench:
		return "source quench"
	case icmpRedirect:
		return "redirect to " + netip.AddrFrom4([4]byte(b[4:8])).String()
	case icmpTimeExceeded:
		if code == 1 {
			return "fragment reassembly time exceeded"
		}
		return "ttl exceeded"
	case icmpParameterProb:
		return fmt.Sprintf("parameter problem at byte %d", b[4])
	case 9:
		return "router advertisement"
	case 10:
		return "router solicitation"
	case icmpTimestamp:
		return "timestamp request"
	case icmpTimestampReply:
		return "timestamp reply"
	case icmpAddress:
		return "address mask request"
	case icmpAddressReply:
		return "address mask reply"
	}
	return fmt.Sprintf("type %d code %d", typ, code)
}

var unreach6Text = [...]string{"no route", "prohibited", "beyond scope of source", "address unreachable",
	"port unreachable", "source address failed policy", "route rejected"}

func icmp6Text(typ, code byte, b []byte) string {
	target := func(what string) string {
		if len(b) >= 24 {
			return what + " " + netip.AddrFrom16([16]byte(b[8:24])).String()
		}
		return what
	}
	switch typ {
	case icmp6DestUnreach:
		if int(code) < len(unreach6Text) {
			return unreach6Text[code]
		}
		return fmt.Sprintf("unreachable code %d", code)
	case icmp6PktTooBig:
		return fmt.Sprintf("packet too big, mtu %d", be32(b, 4))
	case icmp6TimeExceed:
		if code == 1 {
			return "fragment reassembly time exceeded"
		}
		return "hop limit exceeded"
	case icmp6ParamProb:
		return fmt.Sprintf("parameter problem at byte %d", be32(b, 4))
	case icmp6EchoRequest:
		return fmt.Sprintf("echo request id %d seq %d", be16(b, 4), be16(b, 6))
	case icmp6EchoReply:
		return fmt.Sprintf("echo reply id %d seq %d", be16(b, 4), be16(b, 6))
	case 130:
		return "multicast listener query"
	case 131, 143:
		return "multicast listener report"
	case 132:
		return "multicast listener done"
	case 133:
		return "router solicitation"
	case 134:
		return "router advertisement"
	case 135:
		return target("neighbour solicitation for")
	case 136:
		return target("neighbour advertisement of")
	case 137:
		return target("redirect to")
	}
	return fmt.Sprintf("type %d code %d", typ, code)
}

func describeARP(p *events.Packet) string {
	name := "ARP"
	if p.EtherType == 0x8035 {
		name = "RARP"
	}
	var h head
	total := max(p.Len, 0)
	data := p.Data[:min(len(p.Data), total)]
	b := h.bytes(data, total, 0, 8)
	if b == nil {
		return name + h.defect()
	}
	op := be16(b, 6)
	if be16(b, 0) != 1 || be16(b, 2) != 0x0800 || b[4] != 6 || b[5] != 4 {
		return fmt.Sprintf("%s operation %d for hardware %d, protocol 0x%04x", name, op, be16(b, 0), be16(b, 2))
	}
	if b = h.bytes(data, total, 8, 20); b == nil {
		return fmt.Sprintf("%s operation %d%s", name, op, h.defect())
	}
	sender, target := ip4(b[6:10]).String(), ip4(b[16:20]).String()
	switch {
	case name != "ARP":
	case op == 1 && sender == target:
		return "ARP announces " + sender + " at " + mac(b[0:6]).String()
	case op == 1:
		return "ARP who-has " + target + " tell " + sender
	case op == 2:
		return "ARP " + sender + " is-at " + mac(b[0:6]).String()
	}
	return fmt.Sprintf("%s operation %d from %s to %s", name, op, sender, target)
}
