package render

import (
	"encoding/binary"
	"fmt"
	"io"
	"strconv"

	"github.com/nftrace/nftrace/pkg/events"
)

const (
	// logPrefixLen is NF_LOG_PREFIXLEN: nf_log.c:nf_log_trace formats the
	// prefix into so many bytes, its final NUL included.
	logPrefixLen = 128
	// logLineLen is what nf_log.c:nf_log_buf_close gets to print at most:
	// S_SIZE less a NUL, less the two bytes of the level (KERN_SOH "4").
	logLineLen = 1024 - (4 + 1) - 1 - 2
)

const (
	truncated = " [truncated by nftrace]"
	// notCaptured is said of a rule's packet where events gives neither it nor a cause.
	notCaptured = "not captured"
)

// Trace writes the lines that the kernel would have logged for j with TRACE
// rules and nf_log_syslog, from "TRACE: " on, byte for byte: trailing spaces,
// and the cut at the kernel's line length, are the kernel's own. What follows
// is all that can differ:
//
//   - Control characters (interface and chain names may hold them), marks of
//     text direction and bytes that are not UTF-8 are written as \xNN.
//   - A line whose packet was not captured far enough ends where the captured
//     bytes end, in " [truncated by nftrace]".
//   - Where the packet at a rule cannot be told, its part of the line is
//     "[packet unresolved: cause]".
//   - A run of a table whose rules cannot be told is one line
//     "TRACE: table:HOOK:unresolved: cause IN=…", with the packet as the table got it.
//   - ebtables and arptables, for which the kernel has no TRACE, are
//     "TRACE: eb:table:…" and "TRACE: arp:table:…".
//   - Tables of nf_tables are "TRACE: family:table:…", but those of iptables-nft, which look as
//     legacy ones do. A rule's packet is the one that came to it.
//   - A hole in the path is said in a line that begins with "# nftrace: ".
func Trace(w io.Writer, j *events.Journey) error {
	return writeOnce(w, new(logBuf).appendTrace(nil, j))
}

// appendTrace adds the lines of a journey; m is where it works.
func (m *logBuf) appendTrace(b []byte, j *events.Journey) []byte {
	m.pkt = nil // what it points to is used again
	if j.HalfSeen != "" {
		b = append(b, "# nftrace: half seen: "...)
		b = appendEscaped(b, j.HalfSeen)
		b = append(b, '\n')
	}
	steps := j.Steps
	for i := 0; i < len(steps); {
		first := i
		i++
		if steps[first].Table == nil {
			continue
		}
		for part := steps[first].Table.Part; i < len(steps) && steps[i].Table != nil && steps[i].Table.Part == part; {
			i++
		}
		b = m.appendPart(b, steps[first:i])
	}
	if j.Lost > 0 {
		b = fmt.Appendf(b, "# nftrace: %d records of this packet were lost: its path has a hole\n", j.Lost)
	}
	return b
}

// appendPart adds the lines of the tables in a part of a hook's call.
func (m *logBuf) appendPart(b []byte, part []events.Step) []byte {
	l, p := m.linesAt(part)
	known := l != nil && l.of(part, p)
	if known && len(l.text) > 0 {
		if id := be16(p.Data, 4); decLen(id) == l.digits {
			return l.again(b, uint32(id))
		}
	}
	start := len(b)
	for i := range part {
		b = m.appendTable(b, &part[i])
	}
	switch {
	case l == nil || !m.alike.ok: // it is not to be kept
	case known:
		l.keep(m, part, b[start:])
	default:
		l.see(m, part, p)
	}
	return b
}

func (m *logBuf) appendTable(b []byte, s *events.Step) []byte {
	t := s.Table
	for i := range t.Met {
		met := &t.Met[i]
		to := len(t.Rules)
		if i+1 < len(t.Met) {
			to = t.Met[i+1].From
		}
		b = m.appendRules(b, s, t.Rules[met.From:to], met)
	}
	if s.Table.Unresolved != "" {
		b = append(b, "TRACE: "...)
		b = appendEscaped(b, tablePrefix(s)+s.Table.Name+":"+tableHook(s))
		b = append(b, ":unresolved: "...)
		b = appendEscaped(b, s.Table.Unresolved)
		b = append(b, ' ')
		m.packet(s, s.Table.Before)
		b = m.appendLine(b, s, nil)
		b = append(b, '\n')
	}
	return b
}

// appendRules adds the lines of rules that met one packet.
func (m *logBuf) appendRules(b []byte, s *events.Step, rules []events.Rule, met *events.Met) []byte {
	if met.Pkt == nil {
		cause := met.Unsure
		if cause == "" {
			cause = notCaptured
		}
		m.noPacket(s)
		for i := range rules {
			b = m.appendLine(b, s, &rules[i])
			b = append(b, "[packet unresolved: "...)
			b = appendEscaped(b, cause)
			b = append(b, "]\n"...)
		}
		return b
	}
	m.packet(s, met.Pkt)
	if !m.whole {
		for i := range rules {
			b = m.appendLine(b, s, &rules[i])
			b = append(b, '\n')
		}
		return b
	}
	m.b = append(m.b, '\n')
	tail := m.b
	m.b = m.b[:len(m.b)-1]
	for i := range rules {
		if prefix := rules[i].TracePrefix; prefix != "" {
			b = append(append(b, prefix...), tail...)
			continue
		}
		b = m.appendLine(b, s, &rules[i])
		b = append(b, '\n')
	}
	return b
}

// TracePrefix is what the lines of [Trace] about a rule begin with, to be kept with the
// rule: many packets meet it. It is empty if that cannot be said without the packet's part.
func TracePrefix(s *events.Step, r *events.Rule) string {
	b := appendPrefix(nil, s, r)
	if len(b) >= logPrefixLen || !printable(b) {
		return ""
	}
	return string(b)
}

func appendPrefix(b []byte, s *events.Step, r *events.Rule) []byte {
	b = append(b, "TRACE: "...)
	b = appendLabel(b, s, r)
	return append(b, ' ')
}

// appendLine adds the rule's prefix, if there is a rule, and the packet that m holds. It
// cuts where the kernel's buffers end, then escapes.
func (m *logBuf) appendLine(b []byte, s *events.Step, r *events.Rule) []byte {
	start, short, plain := len(b), m.short, m.plain
	if r != nil {
		b = appendPrefix(b, s, r)
		b = b[:min(len(b), start+logPrefixLen-1)]
		plain = plain && printable(b[start:])
	}
	b = append(b, m.b...)
	if len(b)-start >= logLineLen {
		// The kernel would have stopped here too.
		b, short = b[:start+logLineLen], false
	}
	if !plain {
		line := string(b[start:])
		b = appendEscaped(b[:start], line)
	}
	if short {
		if b[len(b)-1] == ' ' {
			b = b[:len(b)-1]
		}
		b = append(b, truncated...)
	}
	return b
}

func (m *logBuf) reset(data []byte, n int) {
	n = max(n, 0)
	m.b, m.data, m.len, m.short = m.b[:0], data[:min(len(data), n)], n, false
	m.used, m.ttl.at = 0, 0
	m.alike.ok = false
}

// noPacket makes m hold the devices alone.
func (m *logBuf) noPacket(s *events.Step) {
	m.reset(nil, 0)
	m.plain = m.devices(s.Place)
	m.pkt, m.whole = nil, false
}

// packet makes m hold what nf_log_syslog.c adds to the prefix for one packet, up to the
// end of the captured bytes: short is set where the kernel had more to say.
func (m *logBuf) packet(s *events.Step, p *events.Packet) {
	if m.pkt == p && m.place == s.Place {
		return
	}
	m.pkt, m.place = p, s.Place
	if m.alike.ok && m.alike.to(s, p) {
		m.again(s, p)
		return
	}
	m.reset(p.Data, p.Len)
	// The rest is letters and digits.
	m.plain = m.devices(s.Place)
	m.dumpPacket(s, p)
	m.whole = m.plain && !m.short && len(m.b) < logLineLen-logPrefixLen
	if m.whole && m.ttl.at > 0 {
		m.alike.like(p, m.used)
	}
}

func (m *logBuf) dumpPacket(s *events.Step, p *events.Packet) {
	switch s.PF {
	case events.PFIPv4:
		m.ipPacket(s, p)
	case events.PFIPv6:
		m.ip6Packet(s, p)
	case events.PFARP:
		m.arp()
	default: // nf_log_netdev_packet
		switch p.EtherType {
		case 0x0800:
			m.ipPacket(s, p)
		case 0x86dd:
			m.ip6Packet(s, p)
		case 0x0806, 0x8035:
			m.arp()
		default: // nf_log_unknown_packet
			m.macHeader(p)
		}
	}
}

// logBuf mirrors net/netfilter/nf_log_syslog.c of Linux 6.12 function for
// function, with the flags of trace_loginfo: NF_LOG_DEFAULT_MASK, which is
// everything but NF_LOG_MACDECODE (so that a VLAN tag is never printed).
// Offsets count from the network header, which is where skb->data is at the IP
// hooks (skb_network_offset is 0).
type logBuf struct {
	b    []byte
	data []byte // the captured bytes, never more than len
	len  int    // skb->len
	// short is set once a header outside the captured bytes was needed;
	// nothing is added from then on.
	short bool

	// What b holds: the packet pkt at place.
	pkt   *events.Packet
	place *events.Place
	plain bool // printable
	whole bool // fits behind any TracePrefix as it is

	reuse
	opts  TraceOptions
	lines *[1 << linesBits]lines // nil: none are kept
}

// add, dec, hex, addr4 … are nf_log_buf_add with one conversion each: they return m,
// so that a line here is a format there.
func (m *logBuf) add(text string) *logBuf {
	if !m.short {
		m.b = append(m.b, text...)
	}
	return m
}

// dec prints as %u.
func (m *logBuf) dec(n uint32) *logBuf {
	if !m.short {
		m.b = appendDec(m.b, n)
	}
	return m
}

// int prints as %d.
func (m *logBuf) int(n int) *logBuf {
	if !m.short {
		m.b = strconv.AppendInt(m.b, int64(n), 10)
	}
	return m
}

// dec16 prints a header's 16 bits as %u.
func (m *logBuf) dec16(b []byte, off int) *logBuf { return m.dec(uint32(be16(b, off))) }

// hex prints as %0*x.
func (m *logBuf) hex(n uint32, width int) *logBuf {
	if !m.short {
		m.b = appendHex(m.b, n, width)
	}
	return m
}

// dump prints bytes in capital digits.
func (m *logBuf) dump(b []byte) *logBuf {
	if !m.short {
		for _, c := range b {
			m.b = appendUpper(m.b, c)
		}
	}
	return m
}

// addr4 prints as %pI4.
func (m *logBuf) addr4(a []byte) *logBuf {
	if !m.short {
		m.b = appendIP4(m.b, a)
	}
	return m
}

// addr6 prints as %pI6.
func (m *logBuf) addr6(a []byte) *logBuf {
	for i := 0; i < 16; i += 2 {
		if i > 0 {
			m.add(":")
		}
		m.hex(uint32(be16(a, i)), 4)
	}
	return m
}

// mac prints as %*phC, which for six bytes is %pM.
func (m *logBuf) mac(a []byte) *logBuf {
	if !m.short {
		m.b = appendMAC(m.b, a)
	}
	return m
}

func appendMAC(b []byte, a []byte) []byte {
	for _, c := range a {
		b = append(b, hexDigits[c>>4], hexDigits[c&15], ':')
	}
	return b[:max(len(b)-1, 0)]
}

const upperDigits = "0123456789ABCDEF"

func appendHex(b []byte, n uint32, width int) []byte {
	for w := 1; w < 8; w++ {
		if n>>(4*w) == 0 {
			width = max(width, w)
			break
		}
		if w == 7 {
			width = 8
		}
	}
	for i := width - 1; i >= 0; i-- {
		b = append(b, hexDigits[n>>(4*i)&15])
	}
	return b
}

// appendDec is strconv.AppendUint, made for the small numbers that headers have.
func appendDec(b []byte, n uint32) []byte {
	digit := func(d uint32) byte { return '0' + byte(d%10) }
	switch {
	case n < 10:
		return append(b, digit(n))
	case n < 100:
		return append(b, digit(n/10), digit(n))
	case n < 1000:
		return append(b, digit(n/100), digit(n/10), digit(n))
	case n < 10000:
		return append(b, digit(n/1000), digit(n/100), digit(n/10), digit(n))
	case n < 100000:
		return append(b, digit(n/10000), digit(n/1000), digit(n/100), digit(n/10), digit(n))
	}
	return strconv.AppendUint(b, uint64(n), 10)
}

func appendUpper(b []byte, c byte) []byte { return append(b, upperDigits[c>>4], upperDigits[c&15]) }

func appendIP4(b []byte, a []byte) []byte {
	for _, c := range a[:4] {
		d := &dottedBytes[c]
		b = append(b, d.text[0], d.text[1], d.text[2], d.text[3])
		b = b[:len(b)-4+d.len]
	}
	return b[:len(b)-1]
}

// dottedBytes are the numbers of an address, each with the dot behind it.
var dottedBytes = func() (all [256]struct {
	text [4]byte
	len  int
}) {
	for i := range all {
		all[i].len = copy(all[i].text[:], strconv.Itoa(i)+".")
	}
	return all
}()

// header is skb_header_pointer: nil where the packet ends before. It is nil too
// where only the capture does; nothing that is then said gets printed.
func (m *logBuf) header(off, n int) []byte {
	switch {
	case off+n > m.len:
		return nil
	case off+n > len(m.data):
		m.short = true
		return nil
	}
	m.used = max(m.used, off+n)
	return m.data[off : off+n]
}

// left is skb->len - off as the kernel prints it (%u).
func (m *logBuf) left(off int) uint32 { return uint32(m.len - off) }

func be16(b []byte, off int) uint16 { return binary.BigEndian.Uint16(b[off:]) }
func be32(b []byte, off int) uint32 { return binary.BigEndian.Uint32(b[off:]) }

// ip4 prints as %pI4.
type ip4 []byte

func (a ip4) String() string { return string(appendIP4(nil, a)) }

// mac prints as %pM.
type mac []byte

func (a mac) String() string { return string(appendMAC(nil, a[:6])) }

// packetCommon is nf_log_dump_packet_common after the prefix.
func (m *logBuf) packetCommon(s *events.Place) {
	m.add("IN=").add(devName(s.In)).add(" OUT=").add(devName(s.Out)).add(" ")
	if s.PhysIn.Index != 0 && s.In.Index != s.PhysIn.Index {
		m.add("PHYSIN=").add(s.PhysIn.Name).add(" ")
	}
	if s.PhysOut.Index != 0 && s.Out.Index != s.PhysOut.Index {
		m.add("PHYSOUT=").add(s.PhysOut.Name).add(" ")
	}
}

func devName(d events.Device) string {
	if d.Index == 0 {
		return ""
	}
	return d.Name
}

func (m *logBuf) ipPacket(s *events.Step, p *events.Packet) {
	if s.In.Index != 0 {
		m.macHeader(p)
	}
	m.rest = len(m.b)
	m.ipv4(p, 0)
}

func (m *logBuf) ip6Packet(s *events.Step, p *events.Packet) {
	if s.In.Index != 0 {
		m.macHeader(p)
	}
	m.ipv6(p, 0, true)
}

const (
	arphrdEther = 1
	arphrdSIT   = 776
)

// macHeader is dump_mac_header, from its label "fallback" on.
func (m *logBuf) macHeader(p *events.Packet) {
	m.add("MAC=")
	if len(p.MAC) > 0 {
		if p.MACDevType == arphrdSIT {
			// The kernel begins ETH_HLEN bytes before the header, which
			// no probe captured. (6.12's sit has hard_header_len 0.)
			m.short = true
		}
		m.addMAC(p.MAC)
	}
	m.add(" ")
}

// arp is dump_arp_packet.
func (m *logBuf) arp() {
	ah := m.header(0, 8)
	if ah == nil {
		m.add("TRUNCATED")
		return
	}
	m.add("ARP HTYPE=").dec16(ah, 0).add(" PTYPE=0x").hex(uint32(be16(ah, 2)), 4).add(" OPCODE=").dec16(ah, 6)
	if be16(ah, 0) != 1 || ah[4] != 6 || ah[5] != 4 {
		return
	}
	ap := m.header(8, 20)
	if ap == nil {
		m.add(" INCOMPLETE [").int(m.len - 8).add(" bytes]")
		return
	}
	m.add(" MACSRC=").mac(ap[0:6]).add(" IPSRC=").addr4(ap[6:10]).add(" MACDST=").mac(ap[10:16]).add(" IPDST=").addr4(ap[16:20])
}

// skUIDGID is nf_log_dump_sk_uid_gid.
func (m *logBuf) skUIDGID(p *events.Packet) {
	if p.HasOwner {
		m.add("UID=").dec(p.UID).add(" GID=").dec(p.GID).add(" ")
	}
}

// tcp is nf_log_dump_tcp_header; true ends the packet's dump.
func (m *logBuf) tcp(fragment bool, off int) bool {
	m.add("PROTO=TCP ")
	if fragment {
		return false
	}
	th := m.header(off, 20)
	if th == nil {
		m.add("INCOMPLETE [").dec(m.left(off)).add(" bytes] ")
		return true
	}
	m.ports(th).add(" SEQ=").dec(be32(th, 4)).add(" ACK=").dec(be32(th, 8))
	m.add(" WINDOW=").dec16(th, 14)
	reserved := uint32(0x0f000000) // TCP_RESERVED_BITS
	if m.opts.AE {
		reserved = 0x0e000000
	}
	m.add(" RES=0x").hex(be32(th, 12)&reserved>>22, 2).add(" ")
	if m.opts.AE && th[12]&1 != 0 {
		m.add("AE ")
	}
	for _, f := range []struct {
		bit  byte
		name string
	}{{0x80, "CWR "}, {0x40, "ECE "}, {0x20, "URG "}, {0x10, "ACK "}, {0x08, "PSH "}, {0x04, "RST "}, {0x02, "SYN "}, {0x01, "FIN "}} {
		if th[13]&f.bit != 0 {
			m.add(f.name)
		}
	}
	m.add("URGP=").dec16(th, 18).add(" ")

	if optsize := int(th[12]>>4)*4 - 20; optsize > 0 {
		op := m.header(off+20, optsize)
		if op == nil {
			m.add("OPT (TRUNCATED)")
			return true
		}
		m.add("OPT (").dump(op).add(") ")
	}
	return false
}

// ports prints what the headers of TCP and UDP begin with.
func (m *logBuf) ports(h []byte) *logBuf {
	if !m.short {
		b := append(m.b, "SPT="...)
		b = appendDec(b, uint32(be16(h, 0)))
		b = append(b, " DPT="...)
		m.b = appendDec(b, uint32(be16(h, 2)))
	}
	return m
}

// udp is nf_log_dump_udp_header; true ends the packet's dump.
func (m *logBuf) udp(proto byte, fragment bool, off int) bool {
	if proto == protoUDP {
		m.add("PROTO=UDP ")
	} else {
		m.add("PROTO=UDPLITE ")
	}
	if fragment {
		return false
	}
	uh := m.header(off, 8)
	if uh == nil {
		m.add("INCOMPLETE [").dec(m.left(off)).add(" bytes] ")
		return true
	}
	m.ports(uh).add(" LEN=").dec16(uh, 4).add(" ")
	return false
}

// icmpRequired is required_len in dump_ipv4_packet.
var icmpRequired = [19]int{
	icmpEchoReply:      4,
	icmpDestUnreach:    8 + 20,
	icmpSourceQuench:   8 + 20,
	icmpRedirect:       8 + 20,
	icmpEcho:           4,
	icmpTimeExceeded:   8 + 20,
	icmpParameterProb:  8 + 20,
	icmpTimestamp:      20,
	icmpTimestampReply: 20,
	icmpAddress:        12,
	icmpAddressReply:   12,
}

// ipv4 is dump_ipv4_packet.
func (m *logBuf) ipv4(p *events.Packet, iphoff int) {
	ih := m.header(iphoff, 20)
	if ih == nil {
		m.add("TRUNCATED")
		return
	}
	// iph_totlen: a TCP packet too long for the field (BIG TCP) has 0 there.
	totlen := int(be16(ih, 2))
	if totlen == 0 && m.len > 0xffff {
		totlen = m.len
	}
	fragOff := be16(ih, 6)
	if !m.short {
		b := append(m.b, "SRC="...)
		b = appendIP4(b, ih[12:16])
		b = append(b, " DST="...)
		b = appendIP4(b, ih[16:20])
		b = append(b, " LEN="...)
		b = appendDec(b, uint32(totlen))
		b = append(b, " TOS=0x"...)
		b = appendUpper(b, ih[1]&0x1e)
		b = append(b, " PREC=0x"...)
		b = appendUpper(b, ih[1]&0xe0)
		b = append(b, " TTL="...)
		ttl := span{at: len(b)}
		b = appendDec(b, uint32(ih[8]))
		ttl.end = len(b)
		b = append(b, idLabel...)
		id := span{at: len(b)}
		b = appendDec(b, uint32(be16(ih, 4)))
		id.end = len(b)
		m.b = append(b, ' ')
		if iphoff == 0 {
			m.ttl, m.id = ttl, id
		}
	}
	if fragOff&0x8000 != 0 {
		m.add("CE ")
	}
	if fragOff&0x4000 != 0 {
		m.add("DF ")
	}
	if fragOff&0x2000 != 0 {
		m.add("MF ")
	}
	fragOff &= 0x1fff
	if fragOff != 0 {
		m.add("FRAG:").dec(uint32(fragOff)).add(" ")
	}

	ihl := int(ih[0]&0xf) * 4
	if ihl > 20 {
		op := m.header(iphoff+20, ihl-20)
		if op == nil {
			m.add("TRUNCATED")
			return
		}
		m.add("OPT (").dump(op).add(") ")
	}

	off := iphoff + ihl
	switch ih[9] {
	case protoTCP:
		if m.tcp(fragOff != 0, off) {
			return
		}
	case protoUDP, protoUDPLite:
		if m.udp(ih[9], fragOff != 0, off) {
			return
		}
	case protoICMP:
		m.icmp(p, fragOff != 0, iphoff, off)
	case protoAH:
		if fragOff != 0 {
			break
		}
		m.add("PROTO=AH ")
		ah := m.header(off, 12)
		if ah == nil {
			m.add("INCOMPLETE [").dec(m.left(off)).add(" bytes] ")
			break
		}
		m.add("SPI=0x").hex(be32(ah, 4), 0).add(" ")
	case protoESP:
		m.add("PROTO=ESP ")
		if fragOff != 0 {
			break
		}
		eh := m.header(off, 8)
		if eh == nil {
			m.add("INCOMPLETE [").dec(m.left(off)).add(" bytes] ")
			break
		}
		m.add("SPI=0x").hex(be32(eh, 0), 0).add(" ")
	default:
		m.add("PROTO=").dec(uint32(ih[9])).add(" ")
	}

	if iphoff == 0 {
		m.skUIDGID(p)
		if p.Mark != 0 {
			m.add("MARK=0x").hex(p.Mark, 0).add(" ")
		}
	}
}

// icmp is the case IPPROTO_ICMP of dump_ipv4_packet.
func (m *logBuf) icmp(p *events.Packet, fragment bool, iphoff, off int) {
	m.add("PROTO=ICMP ")
	if fragment {
		return
	}
	ich := m.header(off, 8)
	if ich == nil {
		m.add("INCOMPLETE [").dec(m.left(off)).add(" bytes] ")
		return
	}
	typ, code := ich[0], ich[1]
	m.add("TYPE=").dec(uint32(typ)).add(" CODE=").dec(uint32(code)).add(" ")
	if int(typ) < len(icmpRequired) && icmpRequired[typ] != 0 && m.left(off) < uint32(icmpRequired[typ]) {
		m.add("INCOMPLETE [").dec(m.left(off)).add(" bytes] ")
		return
	}
	switch typ {
	case icmpEchoReply, icmpEcho:
		m.add("ID=").dec16(ich, 4).add(" SEQ=").dec16(ich, 6).add(" ")
	case icmpParameterProb:
		m.add("PARAMETER=").dec(uint32(ich[4])).add(" ")
	case icmpRedirect, icmpDestUnreach, icmpSourceQuench, icmpTimeExceeded:
		if typ == icmpRedirect {
			m.add("GATEWAY=").addr4(ich[4:8]).add(" ")
		}
		if iphoff == 0 { // only recurse once
			m.add("[")
			m.ipv4(p, off+8)
			m.add("] ")
		}
		if typ == icmpDestUnreach && code == icmpFragNeeded {
			m.add("MTU=").dec16(ich, 6).add(" ")
		}
	}
}

// ipv6 is dump_ipv6_packet.
func (m *logBuf) ipv6(p *events.Packet, ip6hoff int, recurse bool) {
	ih := m.header(ip6hoff, 40)
	if ih == nil {
		m.add("TRUNCATED")
		return
	}
	m.add("SRC=").addr6(ih[8:24]).add(" DST=").addr6(ih[24:40])

	// ipv6_payload_len: as iph_totlen.
	payload := int(be16(ih, 4))
	if payload == 0 && m.len-40 > 0xffff {
		payload = m.len - 40
	}
	m.add(" LEN=").int(payload + 40).add(" TC=").dec(be32(ih, 0) & 0x0ff00000 >> 20)
	m.add(" HOPLIMIT=").dec(uint32(ih[7])).add(" FLOWLBL=").dec(be32(ih, 0) & 0x000fffff).add(" ")

	fragment := false
	ptr := ip6hoff + 40
	cur := ih[6]
	for isIPv6Ext(cur) && cur != protoNone {
		hp := m.header(ptr, 2)
		if hp == nil {
			m.add("TRUNCATED")
			return
		}
		m.add("OPT ( ")
		hdrlen := 0
		switch cur {
		case protoFragment:
			m.add("FRAG:")
			fh := m.header(ptr, 8)
			if fh == nil {
				m.add("TRUNCATED ")
				return
			}
			m.dec(uint32(be16(fh, 2) & 0xfff8)).add(" ")
			if be16(fh, 2)&1 != 0 {
				m.add("INCOMPLETE ")
			}
			m.add("ID:").hex(be32(fh, 4), 8).add(" ")
			if be16(fh, 2)&0xfff8 != 0 {
				fragment = true
			}
			hdrlen = 8
		case protoDstOpts, protoRouting, protoHopOpts:
			if fragment {
				m.add(")")
				return
			}
			hdrlen = (int(hp[1]) + 1) << 3
		case protoAH:
			m.add("AH ")
			if fragment {
				m.add(")")
				return
			}
			ah := m.header(ptr, 12)
			if ah == nil {
				m.add("INCOMPLETE [").dec(m.left(ptr)).add(" bytes] )")
				return
			}
			m.add("SPI=0x").hex(be32(ah, 4), 0).add(" ")
			hdrlen = (int(hp[1]) + 2) << 2
		case protoESP:
			m.add("ESP ")
			if fragment {
				m.add(")")
				return
			}
			eh := m.header(ptr, 8)
			if eh == nil {
				m.add("INCOMPLETE [").dec(m.left(ptr)).add(" bytes] )")
				return
			}
			m.add("SPI=0x").hex(be32(eh, 0), 0).add(" )")
			return
		}
		m.add(") ")
		cur = hp[0]
		ptr += hdrlen
	}

	switch cur {
	case protoTCP:
		if m.tcp(fragment, ptr) {
			return
		}
	case protoUDP, protoUDPLite:
		if m.udp(cur, fragment, ptr) {
			return
		}
	case protoICMPv6:
		if m.icmp6(p, fragment, ptr, recurse) {
			return
		}
	default:
		m.add("PROTO=").dec(uint32(cur)).add(" ")
	}

	if recurse {
		m.skUIDGID(p)
		if p.Mark != 0 {
			m.add("MARK=0x").hex(p.Mark, 0).add(" ")
		}
	}
}

// icmp6 is the case IPPROTO_ICMPV6 of dump_ipv6_packet; true ends the packet's dump.
func (m *logBuf) icmp6(p *events.Packet, fragment bool, ptr int, recurse bool) bool {
	m.add("PROTO=ICMPv6 ")
	if fragment {
		return false
	}
	ic := m.header(ptr, 8)
	if ic == nil {
		m.add("INCOMPLETE [").dec(m.left(ptr)).add(" bytes] ")
		return true
	}
	m.add("TYPE=").dec(uint32(ic[0])).add(" CODE=").dec(uint32(ic[1])).add(" ")
	switch ic[0] {
	case icmp6EchoRequest, icmp6EchoReply:
		m.add("ID=").dec16(ic, 4).add(" SEQ=").dec16(ic, 6).add(" ")
	case icmp6ParamProb, icmp6DestUnreach, icmp6PktTooBig, icmp6TimeExceed:
		if ic[0] == icmp6ParamProb {
			m.add("POINTER=").hex(be32(ic, 4), 8).add(" ")
		}
		if recurse {
			m.add("[")
			m.ipv6(p, ptr+8, false)
			m.add("] ")
		}
		if ic[0] == icmp6PktTooBig {
			m.add("MTU=").dec(be32(ic, 4)).add(" ")
		}
	}
	return false
}
