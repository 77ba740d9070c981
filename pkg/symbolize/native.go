package symbolize

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// more stands for options that RuleText cannot show.
const more = "…"

// RuleText renders entry i as iptables-save would, without "-A CHAIN ". What
// it has no words for ends with "…" behind the extension's name. It is empty
// for policies, ends and heads of chains, which have no rule.
func (t *Table) RuleText(i int) string {
	e := &t.Entries[i]
	if !e.isRule() {
		return ""
	}
	if t.Family == ARP {
		return t.arpRuleText(e)
	}
	var w []string
	h := &e.Header
	not := func(bit uint8) string {
		if h.InvFlags&bit != 0 {
			return "! "
		}
		return ""
	}
	if s, ok := prefixText(h.Src, h.SrcMask); ok || h.InvFlags&invSrc != 0 {
		w = append(w, not(invSrc)+"-s "+s)
	}
	if s, ok := prefixText(h.Dst, h.DstMask); ok || h.InvFlags&invDst != 0 {
		w = append(w, not(invDst)+"-d "+s)
	}
	if h.InIface != "" || h.InvFlags&invIn != 0 {
		w = append(w, not(invIn)+"-i "+h.InIface)
	}
	if h.OutIface != "" || h.InvFlags&invOut != 0 {
		w = append(w, not(invOut)+"-o "+h.OutIface)
	}
	if h.Proto != 0 {
		w = append(w, not(invProto)+"-p "+protoName(h.Proto))
	}
	if t.Family == IPv4 && (h.Flags&ip4FlagFrag != 0 || h.InvFlags&invFrag != 0) {
		w = append(w, not(invFrag)+"-f")
	}
	for i := range e.Matches {
		name, opts, ok := matchText(&e.Matches[i], t.Family)
		w = append(w, extensionText("-m", name, opts, ok))
	}
	switch e.Kind {
	case TargetVerdict, TargetReturn:
		name := "RETURN"
		if e.Kind == TargetVerdict {
			name = verdictName(uint32(e.Verdict))
		}
		w = append(w, "-j "+name)
	case TargetJump:
		w = append(w, "-j "+t.Entries[e.Dest].Chain)
	case TargetGoto:
		w = append(w, "-g "+t.Entries[e.Dest].Chain)
	case TargetExtension:
		opts, ok := t.targetText(e)
		w = append(w, extensionText("-j", e.Target, opts, ok))
	}
	return oneLine(strings.Join(w, " "))
}

// isRule reports that e is one of the rules that iptables-save lists.
func (e *Entry) isRule() bool { return !e.IsPolicy && !e.IsEnd && e.Kind != TargetError }

func extensionText(flag, name, opts string, ok bool) string {
	s := flag + " " + name
	if opts != "" {
		s += " " + opts
	}
	if !ok {
		s += " " + more
	}
	return s
}

// oneLine keeps a hostile string from looking like two rules.
func oneLine(s string) string {
	if !strings.ContainsAny(s, "\n\r") {
		return s
	}
	return strings.NewReplacer("\n", `\n`, "\r", `\r`).Replace(s)
}

// prefixText renders address and mask; ok is false for "any".
func prefixText(addr, mask []byte) (string, bool) {
	a, _ := netip.AddrFromSlice(addr)
	n, gap := 0, false
	for i := range len(mask) * 8 {
		set := mask[i/8]&(0x80>>(i%8)) != 0
		if set && n < i {
			gap = true
		}
		if set {
			n++
		}
	}
	any := allZero(addr) && allZero(mask)
	if gap {
		m, _ := netip.AddrFromSlice(mask)
		return a.String() + "/" + m.String(), true
	}
	return a.String() + "/" + strconv.Itoa(n), !any
}

var protoNames = map[uint16]string{
	1: "icmp", 2: "igmp", 6: "tcp", 17: "udp", 33: "dccp", 41: "ipv6", 47: "gre", 50: "esp", 51: "ah",
	58: "ipv6-icmp", 89: "ospf", 103: "pim", 112: "vrrp", 132: "sctp", 136: "udplite",
}

func protoName(p uint16) string {
	if n, ok := protoNames[p]; ok {
		return n
	}
	return strconv.Itoa(int(p))
}

// dec reads a kernel structure; after the first read beyond the end all
// values are zero and bad is set.
type dec struct {
	b   []byte
	bad bool
}

func (d *dec) bytes(at, n int) []byte {
	if at+n > len(d.b) {
		d.bad = true
		return make([]byte, n)
	}
	return d.b[at : at+n]
}
func (d *dec) u8(at int) uint8      { return d.bytes(at, 1)[0] }
func (d *dec) u16(at int) uint16    { return binary.NativeEndian.Uint16(d.bytes(at, 2)) }
func (d *dec) be16(at int) uint16   { return binary.BigEndian.Uint16(d.bytes(at, 2)) }
func (d *dec) u32(at int) uint32    { return binary.NativeEndian.Uint32(d.bytes(at, 4)) }
func (d *dec) str(at, n int) string { return cString(d.bytes(at, n)) }

// opt is an option that may be inverted: "! --dport 80".
func opt(invert bool, name, value string) string {
	if invert {
		name = "! " + name
	}
	return strings.TrimRight(name+" "+value, " ")
}

func portRange(a, b uint16) string {
	if a == b {
		return strconv.Itoa(int(a))
	}
	return fmt.Sprintf("%d:%d", a, b)
}

// matchText renders the options of a match in a table of family; ok is false where some are not
// shown.
func matchText(m *Match, family Family) (name, opts string, ok bool) {
	d := &dec{b: m.Data}
	var w []string
	name, ok = m.Name, true
	switch key := fmt.Sprintf("%s/%d", m.Name, m.Revision); key {
	case "tcp/0":
		w = ports(d, d.u8(11))
		if inv := d.u8(11)&8 != 0; d.u8(8) != 0 || inv {
			w = append(w, opt(inv, "--tcp-option", strconv.Itoa(int(d.u8(8)))))
		}
		if inv := d.u8(11)&4 != 0; d.u8(9) != 0 || inv {
			w = append(w, opt(inv, "--tcp-flags", tcpFlags(d.u8(9))+" "+tcpFlags(d.u8(10))))
		}
	case "udp/0", "udplite/0":
		w = ports(d, d.u8(8))
	case "icmp/0", "icmp6/0":
		flag := "--icmp-type"
		if m.Name == "icmp6" {
			flag = "--icmpv6-type"
		}
		typ := strconv.Itoa(int(d.u8(0)))
		if d.u8(0) == 255 && m.Name == "icmp" {
			typ = "any"
		} else if lo, hi := d.u8(1), d.u8(2); lo != 0 || hi != 255 {
			typ += "/" + strconv.Itoa(int(lo))
			ok = lo == hi
		}
		w = append(w, opt(d.u8(3)&1 != 0, flag, typ))
	case "comment/0":
		w = append(w, "--comment "+quote(cString(m.Data)))
	case "mark/1", "connmark/1":
		w = append(w, opt(d.u8(8) != 0, "--mark", markText(d.u32(0), d.u32(4))))
	case "state/0":
		w = append(w, "--state "+stateNames(uint16(d.u32(0)), xtStates))
	case "conntrack/1", "conntrack/2", "conntrack/3":
		flags, inv := d.u16(ctMatchFlags), d.u16(ctInvertFlags)
		states := uint16(d.u8(ctStateMask))
		if m.Revision > 1 {
			states = d.u16(ctStateMask)
		}
		flag := "--ctstate"
		if flags&ctStateAlias != 0 {
			name, flag = "state", "--state"
		}
		if flags&ctState != 0 {
			w = append(w, opt(inv&ctState != 0, flag, stateNames(states, conntrackStates)))
		}
		ok = flags&^(ctState|ctStateAlias) == 0
	case "addrtype/1":
		flags := d.u32(4)
		if v := d.u16(0); v != 0 {
			w = append(w, opt(flags&1 != 0, "--src-type", bitNames(uint32(v), addrTypes)))
		}
		if v := d.u16(2); v != 0 {
			w = append(w, opt(flags&2 != 0, "--dst-type", bitNames(uint32(v), addrTypes)))
		}
		if flags&4 != 0 {
			w = append(w, "--limit-iface-in")
		}
		if flags&8 != 0 {
			w = append(w, "--limit-iface-out")
		}
	case "multiport/1":
		kind := d.u8(0)
		n := int(d.u8(1))
		if kind > 2 || n > 15 {
			ok = false
			break
		}
		var list []string
		for i := 0; i < n; i++ {
			p := portRange(d.u16(2+2*i), d.u16(2+2*i))
			if d.u8(32+i) != 0 && i+1 < n {
				p = fmt.Sprintf("%d:%d", d.u16(2+2*i), d.u16(4+2*i))
				i++
			}
			list = append(list, p)
		}
		w = append(w, opt(d.u8(47) != 0, [3]string{"--sports", "--dports", "--ports"}[kind], strings.Join(list, ",")))
	case "limit/0":
		avg := d.u32(0)
		if avg == 0 {
			ok = false
			break
		}
		w = append(w, "--limit "+rateText(avg))
		if burst := d.u32(4); burst != 5 {
			w = append(w, fmt.Sprintf("--limit-burst %d", burst))
		}
	case "mac/0":
		w = append(w, opt(d.u32(8) != 0, "--mac-source", net.HardwareAddr(d.bytes(0, 6)).String()))
	case "ttl/0", "hl/0":
		words := []string{"--ttl-eq", "! --ttl-eq", "--ttl-lt", "--ttl-gt"}
		if m.Name == "hl" {
			words = []string{"--hl-eq", "! --hl-eq", "--hl-lt", "--hl-gt"}
		}
		if mode := int(d.u8(0)); mode < len(words) {
			w = append(w, words[mode]+" "+strconv.Itoa(int(d.u8(1))))
		} else {
			ok = false
		}
	case "length/0":
		w = append(w, opt(d.u8(4) != 0, "--length", portRange(d.u16(0), d.u16(2))))
	case "pkttype/0":
		types := map[uint32]string{0: "unicast", 1: "broadcast", 2: "multicast"}
		v, known := types[d.u32(0)]
		if !known {
			ok = false
			break
		}
		w = append(w, opt(d.u32(4) != 0, "--pkt-type", v))
	case "tos/1":
		w = append(w, opt(d.u8(2) != 0, "--tos", fmt.Sprintf("0x%02x/0x%02x", d.u8(1), d.u8(0))))
	case "dscp/0":
		w = append(w, opt(d.u8(1) != 0, "--dscp", fmt.Sprintf("0x%02x", d.u8(0))))
	case "iprange/1":
		flags := d.u8(64)
		for i, what := range []string{"--src-range", "--dst-range"} {
			if flags&(1<<i) == 0 {
				continue
			}
			n := 4
			if family == IPv6 {
				n = 16
			}
			lo, _ := netip.AddrFromSlice(d.bytes(32*i, n))
			hi, _ := netip.AddrFromSlice(d.bytes(32*i+16, n))
			w = append(w, opt(flags&(0x10<<i) != 0, what, lo.String()+"-"+hi.String()))
		}
	default:
		return m.Name, "", false
	}
	if d.bad {
		return m.Name, "", false
	}
	return name, strings.Join(w, " "), ok
}

// ports reads struct xt_tcp's and xt_udp's first fields.
func ports(d *dec, inv uint8) []string {
	var w []string
	for i, flag := range []string{"--sport", "--dport"} {
		lo, hi := d.u16(4*i), d.u16(4*i+2)
		if not := inv&(1<<i) != 0; lo != 0 || hi != 0xffff || not {
			w = append(w, opt(not, flag, portRange(lo, hi)))
		}
	}
	return w
}

func bitNames(v uint32, names []string) string {
	var w []string
	for v != 0 {
		i := bits.TrailingZeros32(v)
		v &^= 1 << i
		if i < len(names) && names[i] != "" {
			w = append(w, names[i])
		} else {
			w = append(w, more)
		}
	}
	return strings.Join(w, ",")
}

var addrTypes = []string{"UNSPEC", "UNICAST", "LOCAL", "BROADCAST", "ANYCAST", "MULTICAST", "BLACKHOLE",
	"UNREACHABLE", "PROHIBIT", "THROW", "NAT", "XRESOLVE"}

func tcpFlags(v uint8) string {
	if v == 0 {
		return "NONE"
	}
	return bitNames(uint32(v), []string{"FIN", "SYN", "RST", "PSH", "ACK", "URG"})
}

type stateBit struct {
	bit  uint16
	name string
}

var (
	// conntrackStates are the bits of include/uapi/linux/netfilter/xt_conntrack.h in iptables' order.
	conntrackStates = []stateBit{{1, "INVALID"}, {8, "NEW"}, {4, "RELATED"}, {2, "ESTABLISHED"},
		{1 << 8, "UNTRACKED"}, {1 << 6, "SNAT"}, {1 << 7, "DNAT"}}
	// xtStates are those of xt_state.h.
	xtStates = []stateBit{{1, "INVALID"}, {8, "NEW"}, {4, "RELATED"}, {2, "ESTABLISHED"}, {1 << 6, "UNTRACKED"}}
)

// stateNames prints a conntrack state mask.
func stateNames(mask uint16, names []stateBit) string {
	var w []string
	for _, s := range names {
		if mask&s.bit != 0 {
			w = append(w, s.name)
			mask &^= s.bit
		}
	}
	if mask != 0 {
		w = append(w, more)
	}
	return strings.Join(w, ",")
}

func markText(v, mask uint32) string {
	if mask == 0xffffffff {
		return fmt.Sprintf("0x%x", v)
	}
	return fmt.Sprintf("0x%x/0x%x", v, mask)
}

// rateText mirrors iptables' libxt_limit.c:print_rate.
func rateText(period uint32) string {
	rates := []struct {
		name string
		mult uint32
	}{{"day", 24 * 60 * 60 * 10000}, {"hour", 60 * 60 * 10000}, {"min", 60 * 10000}, {"sec", 10000}}
	i := 1
	for ; i < len(rates); i++ {
		if period > rates[i].mult || rates[i].mult/period < rates[i].mult%period {
			break
		}
	}
	return fmt.Sprintf("%d/%s", rates[i-1].mult/period, rates[i-1].name)
}

// quote mirrors iptables' libxtables/xtables.c:xtables_save_string.
func quote(s string) string {
	plain := s != ""
	for _, c := range []byte(s) {
		if !(c == '_' || c == '-' || c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z') {
			plain = false
		}
	}
	if plain {
		return s
	}
	return `"` + strings.NewReplacer(`"`, `\"`, `\`, `\\`, `'`, `\'`).Replace(s) + `"`
}

var rejectWith = map[Family]map[uint32]string{
	IPv4: {0: "icmp-net-unreachable", 1: "icmp-host-unreachable", 2: "icmp-proto-unreachable",
		3: "icmp-port-unreachable", 5: "icmp-net-prohibited", 6: "icmp-host-prohibited", 7: "tcp-reset",
		8: "icmp-admin-prohibited"},
	IPv6: {0: "icmp6-no-route", 1: "icmp6-adm-prohibited", 3: "icmp6-addr-unreachable",
		4: "icmp6-port-unreachable", 6: "tcp-reset", 7: "icmp6-policy-fail", 8: "icmp6-reject-route"},
}

// targetText renders a target extension's options.
func (t *Table) targetText(e *Entry) (opts string, ok bool) {
	d := &dec{b: e.Data}
	ok = true
	switch key := fmt.Sprintf("%s/%d", e.Target, e.Revision); key {
	case "REJECT/0":
		var with string
		if with, ok = rejectWith[t.Family][d.u32(0)]; ok {
			opts = "--reject-with " + with
		}
	case "MARK/2":
		opts = fmt.Sprintf("--set-xmark 0x%x/0x%x", d.u32(0), d.u32(4))
	case "LOG/0":
		var w []string
		if p := d.str(2, 30); p != "" {
			w = append(w, "--log-prefix "+quote(p))
		}
		if l := d.u8(0); l != 4 {
			w = append(w, fmt.Sprintf("--log-level %d", l))
		}
		for i, o := range []string{"--log-tcp-sequence", "--log-tcp-options", "--log-ip-options", "--log-uid", "", "--log-macdecode"} {
			if d.u8(1)&(1<<i) != 0 && o != "" {
				w = append(w, o)
			}
		}
		opts = strings.Join(w, " ")
	case "TTL/0", "HL/0":
		name := strings.ToLower(e.Target)
		if mode := int(d.u8(0)); mode < 3 {
			opts = fmt.Sprintf("--%s-%s %d", name, [3]string{"set", "inc", "dec"}[mode], d.u8(1))
		} else {
			ok = false
		}
	case "TOS/1":
		opts = fmt.Sprintf("--set-tos 0x%02x/0x%02x", d.u8(0), d.u8(1))
	case "DSCP/0":
		opts = fmt.Sprintf("--set-dscp 0x%02x", d.u8(0))
	case "TRACE/0":
	case "CLASSIFY/0":
		p := d.u32(0)
		opts = fmt.Sprintf("--set-class %04x:%04x", p>>16, p&0xffff)
	case "DNAT/0", "SNAT/0", "MASQUERADE/0", "REDIRECT/0", "DNAT/1", "SNAT/1", "DNAT/2":
		opts, ok = t.natText(d, e)
	default:
		return "", false
	}
	if d.bad {
		return "", false
	}
	return opts, ok
}

// natText renders nf_nat_ipv4_multi_range_compat (IPv4, revision 0) and
// nf_nat_range, nf_nat_range2 (include/uapi/linux/netfilter/nf_nat.h).
func (t *Table) natText(d *dec, e *Entry) (string, bool) {
	const (
		mapIPs, proto, random, persistent, fully, offset = 1, 2, 4, 8, 16, 32
	)
	var flags uint32
	var lo, hi netip.Addr
	var p0, p1 uint16
	if t.Family == IPv4 && e.Revision == 0 {
		if d.u32(0) != 1 {
			return "", false
		}
		flags = d.u32(4)
		lo, _ = netip.AddrFromSlice(d.bytes(8, 4))
		hi, _ = netip.AddrFromSlice(d.bytes(12, 4))
		p0, p1 = d.be16(16), d.be16(18)
	} else {
		flags = d.u32(0)
		n := 16
		if t.Family == IPv4 {
			n = 4
		}
		lo, _ = netip.AddrFromSlice(d.bytes(4, n))
		hi, _ = netip.AddrFromSlice(d.bytes(20, n))
		p0, p1 = d.be16(36), d.be16(38)
	}
	ports := ""
	if flags&proto != 0 {
		ports = strconv.Itoa(int(p0))
		if p1 != p0 {
			ports += "-" + strconv.Itoa(int(p1))
		}
	}
	var w []string
	switch e.Target {
	case "MASQUERADE", "REDIRECT":
		if ports != "" {
			w = append(w, "--to-ports "+ports)
		}
	default:
		to := ""
		if flags&mapIPs != 0 {
			to = lo.String()
			if hi != lo {
				to += "-" + hi.String()
			}
			if ports != "" && t.Family == IPv6 {
				to = "[" + to + "]"
			}
		}
		if ports != "" {
			to += ":" + ports
		}
		flag := "--to-source "
		if e.Target == "DNAT" {
			flag = "--to-destination "
		}
		w = append(w, flag+to)
	}
	if flags&random != 0 {
		w = append(w, "--random")
	}
	if flags&fully != 0 {
		w = append(w, "--random-fully")
	}
	if flags&persistent != 0 {
		w = append(w, "--persistent")
	}
	return strings.Join(w, " "), flags&offset == 0
}
