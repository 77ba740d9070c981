package symbolize

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
)

// An ARP packet on a device with addresses of etherLen bytes, as arp_tables reads it whatever
// the packet's own lengths say: sender and target, each with hardware and protocol address.
const (
	etherLen  = 6
	arpHeader = 8 // struct arphdr
	arpSrcMAC = arpHeader
	arpSrcIP  = arpSrcMAC + etherLen
	arpDstMAC = arpSrcIP + 4
	arpDstIP  = arpDstMAC + etherLen

	// ARPLen is what such a packet counts for in the rules' byte counters.
	ARPLen = arpDstIP + 4
)

// arpPlausible mirrors net/ipv4/netfilter/arp_tables.c:arp_packet_match.
func (h *Header) arpPlausible(p *PacketInfo) bool {
	inverted := func(bit uint16) bool { return h.arp.inv&bit != 0 }
	if sameIface(p.In, h.inIface, h.inMask) == inverted(arpInvIn) ||
		sameIface(p.Out, h.outIface, h.outMask) == inverted(arpInvOut) {
		return false
	}
	b := p.ARP
	if b == nil {
		return true
	}
	u16 := func(at int) uint16 { return binary.BigEndian.Uint16(b[at:]) }
	for _, c := range []struct {
		bit  uint16
		same bool
	}{
		{arpInvHwType, u16(0)&h.arp.hwTypeMask == h.arp.hwType},
		{arpInvProtoType, u16(2)&h.arp.protoMask == h.arp.protoType},
		{arpInvHLen, b[4]&h.arp.hlenMask == h.arp.hlen},
		{arpInvOp, u16(6)&h.arp.opMask == h.arp.op},
		{arpInvSrcMAC, sameMAC(b[arpSrcMAC:arpSrcIP], h.arp.srcMAC, h.arp.srcMACMask)},
		{arpInvDstMAC, sameMAC(b[arpDstMAC:arpDstIP], h.arp.dstMAC, h.arp.dstMACMask)},
		{arpInvSrc, sameMasked(netip.AddrFrom4([4]byte(b[arpSrcIP:])), h.Src, h.SrcMask)},
		{arpInvDst, sameMasked(netip.AddrFrom4([4]byte(b[arpDstIP:])), h.Dst, h.DstMask)},
	} {
		if c.same == inverted(c.bit) {
			return false
		}
	}
	return true
}

// sameMAC mirrors arp_tables.c:arp_devaddr_compare.
func sameMAC(mac, want, mask []byte) bool {
	for i := range mac {
		if (mac[i]^want[i])&mask[i] != 0 {
			return false
		}
	}
	return true
}

// arpRuleText renders a rule as arptables-legacy -L -n does.
func (t *Table) arpRuleText(e *Entry) string {
	var w []string
	h, a := &e.Header, &e.Header.arp
	add := func(inv uint16, words ...string) {
		if a.inv&inv != 0 {
			w = append(w, "!")
		}
		w = append(w, words...)
	}
	switch e.Kind {
	case TargetVerdict:
		w = append(w, "-j", verdictName(uint32(e.Verdict)))
	case TargetReturn:
		w = append(w, "-j", "RETURN")
	case TargetJump:
		w = append(w, "-j", t.Entries[e.Dest].Chain)
	case TargetExtension:
		w = append(w, "-j", e.Target)
	}
	if h.InIface != "" || a.inv&arpInvIn != 0 {
		add(arpInvIn, "-i", h.InIface)
	}
	if h.OutIface != "" || a.inv&arpInvOut != 0 {
		add(arpInvOut, "-o", h.OutIface)
	}
	if !allZero(h.SrcMask) || a.inv&arpInvSrc != 0 {
		add(arpInvSrc, "-s", arpAddrText(h.Src, h.SrcMask))
	}
	if !allZero(a.srcMACMask) || a.inv&arpInvSrcMAC != 0 {
		add(arpInvSrcMAC, "--src-mac", macText(a.srcMAC, a.srcMACMask))
	}
	if !allZero(h.DstMask) || a.inv&arpInvDst != 0 {
		add(arpInvDst, "-d", arpAddrText(h.Dst, h.DstMask))
	}
	if !allZero(a.dstMACMask) || a.inv&arpInvDstMAC != 0 {
		add(arpInvDstMAC, "--dst-mac", macText(a.dstMAC, a.dstMACMask))
	}
	if a.hlenMask != 0 {
		s := fmt.Sprint(a.hlen)
		if a.hlenMask != 0xff {
			s += fmt.Sprintf("/%d", a.hlenMask)
		}
		add(arpInvHLen, "--h-length", s)
	}
	masked := func(format string, v, mask uint16) string {
		s := fmt.Sprintf(format, v)
		if mask != 0xffff {
			s += "/" + fmt.Sprintf(strings.TrimPrefix(format, "0x"), mask)
		}
		return s
	}
	if a.opMask != 0 {
		add(arpInvOp, "--opcode", masked("%d", a.op, a.opMask))
	}
	if a.hwTypeMask != 0 {
		add(arpInvHwType, "--h-type", masked("%d", a.hwType, a.hwTypeMask))
	}
	if a.protoMask != 0 {
		add(arpInvProtoType, "--proto-type", masked("0x%x", a.protoType, a.protoMask))
	}
	if e.Kind == TargetExtension {
		opts, ok := t.arpTargetText(e)
		if opts != "" {
			w = append(w, opts)
		}
		if !ok {
			w = append(w, more)
		}
	}
	return oneLine(strings.Join(w, " "))
}

// arpAddrText leaves out what says that all bits count.
func arpAddrText(addr, mask []byte) string {
	s, _ := prefixText(addr, mask)
	return strings.TrimSuffix(s, "/32")
}

func macText(addr, mask []byte) string {
	s := net.HardwareAddr(addr[:etherLen]).String()
	if m := net.HardwareAddr(mask[:etherLen]).String(); m != "ff:ff:ff:ff:ff:ff" {
		s += "/" + m
	}
	return s
}

func (t *Table) arpTargetText(e *Entry) (opts string, ok bool) {
	d := &dec{b: e.Data}
	ok = true
	switch key := fmt.Sprintf("%s/%d", e.Target, e.Revision); key {
	case arpMangle + "/0":
		opts = mangleText(d)
	case "CLASSIFY/0":
		p := d.u32(0)
		opts = fmt.Sprintf("--set-class %x:%x", p>>16, p&0xffff)
	case "MARK/2":
		// As arptables prints it, whose --set-mark leaves the mask 0.
		switch v, mask := d.u32(0), d.u32(4); {
		case v == 0:
			opts = fmt.Sprintf("--and-mark %x", ^mask)
		case v == mask:
			opts = fmt.Sprintf("--or-mark %x", v)
		default:
			opts = fmt.Sprintf("--set-mark %x", v)
		}
	default:
		ok = false
	}
	if d.bad {
		return "", false
	}
	return opts, ok
}

// FollowARP is the path of packet p, which is whole, through the table at hook. Rules of
// arp_tables look at nothing but the packet and its devices, and what their targets make of it is
// known, so that there is one path even where Walk finds several to fit the hits. The error is
// ErrNoWalk if its hits are others than those.
//
// It mirrors net/ipv4/netfilter/arp_tables.c:arpt_do_table.
func (t *Table) FollowARP(hook int, hits []Hit, p PacketInfo) (path *Path, verdict int, err error) {
	if t.Family != ARP || p.ARP == nil || hook < 0 || hook >= NumHooks || t.HookEntry[hook] < 0 {
		return nil, 0, fmt.Errorf("%w: hook %d of %v table %q", ErrNoWalk, hook, t.Family, t.Name)
	}
	left := map[int]uint64{}
	for _, h := range hits {
		left[h.Index] += h.Packets
	}
	path = &Path{}
	var stack []frame
	depth := 0
	for i, ended := t.HookEntry[hook], false; !ended; {
		if i >= len(t.Entries) {
			return nil, 0, fmt.Errorf("%w: the packet leaves the table", ErrNoWalk)
		}
		e := &t.Entries[i]
		if !e.Header.arpPlausible(&p) {
			i++
			continue
		}
		v := Visit{Index: i, Depth: depth, IsPolicy: e.IsPolicy, IsEnd: e.IsEnd}
		v.Chain, v.Type, v.Num = t.TraceName(hook, i)
		if left[i] == 0 {
			return nil, 0, fmt.Errorf("%w: the packet fits %s:%d, which did not count it", ErrNoWalk, v.Chain, v.Num)
		}
		left[i]--
		switch e.Kind {
		case TargetVerdict:
			verdict, ended = int(uint32(e.Verdict)&nfVerdictMask), true
		case TargetReturn:
			if n := len(stack); n == 0 {
				i = t.Underflow[hook]
			} else {
				i, depth, stack = stack[n-1].entry+1, stack[n-1].depth, stack[:n-1]
			}
		case TargetNext:
			i++
		case TargetJump:
			stack = append(stack, frame{entry: i, depth: depth})
			i, depth = e.Dest, depth+1
		case TargetGoto:
			i, depth = e.Dest, depth+1
		default:
			if ended = endsOf(e) == endsAlways; ended && e.Target == arpMangle {
				verdict = int(mangleVerdict(e) & nfVerdictMask)
				break
			}
			_, data, ok := t.Apply(i, 0, p.ARP[:])
			if !ok || ended {
				return nil, 0, fmt.Errorf("%w: what %s made of the packet is not known", ErrNoWalk, e.Target)
			}
			p.ARP = (*[ARPLen]byte)(data)
			i++
		}
		v.Action = t.action(e, ended)
		path.Visits = append(path.Visits, v)
	}
	for i, n := range left {
		if n > 0 {
			chain, _, num := t.TraceName(hook, i)
			return nil, 0, fmt.Errorf("%w: the packet does not come to %s:%d", ErrNoWalk, chain, num)
		}
	}
	return path, verdict, nil
}

// net/ipv4/netfilter/arpt_mangle.c

const (
	arpMangle = "mangle"

	// struct arpt_mangle (include/uapi/linux/netfilter_arp/arpt_mangle.h)
	mangleSrcMAC = 0
	mangleDstMAC = 16
	mangleSrcIP  = 32
	mangleDstIP  = 36
	mangleFlags  = 40
	mangleTarget = 44

	xtContinue = 0xffffffff // XT_CONTINUE
)

// mangleParts are what ARPT_MANGLE_* flags have set, in the kernel's order.
var mangleParts = []struct {
	flag           uint8
	name           string
	from, to, size int // in struct arpt_mangle, and in the packet
}{
	{1, "mac-s", mangleSrcMAC, arpSrcMAC, etherLen},
	{4, "ip-s", mangleSrcIP, arpSrcIP, 4},
	{2, "mac-d", mangleDstMAC, arpDstMAC, etherLen},
	{8, "ip-d", mangleDstIP, arpDstIP, 4},
}

// mangleVerdict is what the target returns unless the packet is too short (then DROP).
func mangleVerdict(e *Entry) uint32 {
	d := dec{b: e.Data}
	return d.u32(mangleTarget)
}

func mangleText(d *dec) string {
	var w []string
	flags := d.u8(mangleFlags)
	for _, name := range []string{"ip-s", "mac-s", "ip-d", "mac-d"} {
		for _, p := range mangleParts {
			if p.name != name || flags&p.flag == 0 {
				continue
			}
			b := d.bytes(p.from, p.size)
			s := net.HardwareAddr(b).String()
			if p.size == 4 {
				s = netip.AddrFrom4([4]byte(b)).String()
			}
			w = append(w, "--mangle-"+name, s)
		}
	}
	if v := d.u32(mangleTarget); v == xtContinue {
		w = append(w, "--mangle-target", "CONTINUE")
	} else if v != nfAccept {
		w = append(w, "--mangle-target", verdictName(v))
	}
	return strings.Join(w, " ")
}

// mangleARP does to an ARP packet what target mangle does.
func mangleARP(e *Entry, data []byte) ([]byte, bool) {
	d := dec{b: e.Data}
	flags := d.u8(mangleFlags)
	if e.Target != arpMangle || d.bad || len(data) < ARPLen || data[4] != etherLen || data[5] != 4 {
		return data, false
	}
	b := bytes.Clone(data)
	for _, p := range mangleParts {
		if flags&p.flag != 0 {
			copy(b[p.to:], d.bytes(p.from, p.size))
		}
	}
	return b, !d.bad
}
