package filter

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/cilium/ebpf/asm"
)

// maxNesting bounds parentheses and nots within each other.
const maxNesting = 100

// dir is the direction qualifier of a primitive.
type dir string

const (
	dirAny dir = ""
	dirSrc dir = "src"
	dirDst dir = "dst"
	dirOr  dir = "src or dst"
	dirAnd dir = "src and dst"
)

// qual are the qualifiers of a value (libpcap's struct qual).
type qual struct {
	proto string // "" or a protocol keyword
	dir   dir
	typ   string // "" (as host), host, net, port, portrange, proto
	none  bool   // there is nothing to inherit: a value cannot stand here
}

// parser follows libpcap's grammar.y. Its methods stop at the first error,
// which they leave in err.
type parser struct {
	tokens    []token
	next      int
	depth     int
	behindTag bool // vlan was read: what follows looks behind the tag
	err       error
}

// parse turns an expression into a tree of conj, disj, negation and leaf, or
// nil for an empty expression.
func parse(expr string) (cond, error) {
	tokens, err := scan(expr)
	if err != nil {
		return nil, err
	}
	p := parser{tokens: tokens}
	if p.peek().kind == kindEnd {
		return nil, nil
	}
	c, _ := p.expr(qual{none: true})
	if p.err == nil && p.peek().kind != kindEnd {
		p.unexpected("and, or or the end")
	}
	if p.err == nil {
		_, _, p.err = tagged(c, tagUnknown)
	}
	if p.err != nil {
		return nil, p.err
	}
	return c, nil
}

func (p *parser) peek() token { return p.tokens[p.next] }

func (p *parser) peekAt(n int) token {
	return p.tokens[min(p.next+n, len(p.tokens)-1)]
}

// take consumes the next token, but never the end.
func (p *parser) take() token {
	t := p.peek()
	if t.kind != kindEnd {
		p.next++
	}
	return t
}

func (p *parser) isSymbol(texts ...string) bool {
	t := p.peek()
	if t.kind != kindSymbol {
		return false
	}
	for _, s := range texts {
		if t.text == s {
			return true
		}
	}
	return false
}

// accept consumes the symbol if it is next.
func (p *parser) accept(text string) bool {
	if !p.isSymbol(text) {
		return false
	}
	p.next++
	return true
}

func (p *parser) expect(text string) {
	if !p.accept(text) {
		p.unexpected(strconv.Quote(text))
	}
}

// fail records the first error and ends the parsing.
func (p *parser) fail(at token, format string, args ...any) {
	if p.err != nil {
		return
	}
	p.err = fmt.Errorf("%s at position %d", fmt.Sprintf(format, args...), at.pos+1)
	p.next = len(p.tokens) - 1
}

func (p *parser) unexpected(want string) {
	t := p.peek()
	if t.kind == kindEnd {
		p.fail(t, "the expression ends where %s is missing", want)
		return
	}
	p.fail(t, "unexpected %q where %s is expected", t.text, want)
}

func (p *parser) enter() bool {
	p.depth++
	if p.depth > maxNesting {
		p.fail(p.peek(), "more than %d parentheses or nots within each other", maxNesting)
		return false
	}
	return true
}

func (p *parser) leave() { p.depth-- }

// expr parses terms joined by and and or, which bind equally and to the left.
// outer are the qualifiers before the expression; those behind it are returned.
func (p *parser) expr(outer qual) (cond, qual) {
	c, q := p.term(outer)
	return p.joined(c, q, func(q qual) (cond, qual) {
		if p.valueAhead() {
			return p.value(q), q
		}
		return p.term(q)
	})
}

// joined parses (and|or) operand as long as there is any.
func (p *parser) joined(c cond, q qual, operand func(qual) (cond, qual)) (cond, qual) {
	for p.err == nil && p.isSymbol("and", "or") {
		op := p.take().text
		var right cond
		right, q = operand(q)
		if op == "and" {
			c = conj{c, right}
		} else {
			c = disj{c, right}
		}
	}
	return c, q
}

// valueAhead reports whether a value without qualifiers of its own follows,
// perhaps behind nots and parentheses.
func (p *parser) valueAhead() bool {
	for i := 0; ; i++ {
		t := p.peekAt(i)
		switch t.kind {
		case kindSymbol:
			if t.text != "not" && t.text != "(" {
				return false
			}
		case kindEnd:
			return false
		default:
			return true
		}
	}
}

func (p *parser) term(outer qual) (cond, qual) {
	if !p.enter() {
		return nil, outer
	}
	defer p.leave()
	if p.accept("not") {
		c, q := p.term(outer)
		return negation{c}, q
	}
	if p.isSymbol("(") {
		if c, ok := p.relationAhead(); ok {
			return c, qual{none: true}
		}
		p.take()
		c, _ := p.expr(outer)
		p.expect(")")
		// What follows inherits from what went before the parentheses.
		return c, outer
	}
	return p.primitive()
}

// relationAhead parses a comparison that begins with a parenthesis, if it is one.
func (p *parser) relationAhead() (cond, bool) {
	start := p.next
	c := p.relation()
	if p.err != nil {
		p.err, p.next = nil, start
		return nil, false
	}
	return c, true
}

func (p *parser) primitive() (cond, qual) {
	start := p.peek()
	var q qual
	switch {
	case p.isSymbol("less", "greater"):
		return p.length(), qual{none: true}
	case p.isSymbol("vlan"):
		return p.vlan(), qual{none: true}
	case p.isSymbol("len"):
		return p.relation(), qual{none: true}
	case p.isSymbol("ether", "ip", "ip6", "arp", "rarp", "tcp", "udp", "sctp", "icmp", "icmp6",
		"igmp", "pim", "vrrp", "carp", "ah", "esp"):
		if t := p.peekAt(1); t.kind == kindSymbol && t.text == "[" {
			return p.relation(), qual{none: true}
		}
		q.proto = p.take().text
	}
	switch {
	case p.isSymbol("proto"):
		q.typ = p.take().text
		return p.value(q), q
	case p.isSymbol("src", "dst"):
		q.dir = p.direction()
	}
	if p.isSymbol("host", "net", "port", "portrange") {
		q.typ = p.take().text
	}
	if q.dir == "" && q.typ == "" {
		if q.proto == "" {
			p.noPrimitive()
			return nil, qual{none: true}
		}
		return p.protocol(start), qual{none: true}
	}
	return p.value(q), q
}

// noPrimitive reports that the next token does not begin a primitive.
func (p *parser) noPrimitive() {
	switch t := p.peek(); t.kind {
	case kindEnd, kindSymbol:
		p.unexpected("a primitive such as host, net, port, tcp")
	case kindName:
		p.fail(t, "unknown word %q (supported are %s)", t.text, supported)
	default:
		p.fail(t, "%q needs a qualifier before it, such as host, net, port or proto,", t.text)
	}
}

// direction parses src, dst and their combinations.
func (p *parser) direction() dir {
	first := p.take().text
	if !p.isSymbol("and", "or") {
		return dir(first)
	}
	d := dirOr
	if p.take().text == "and" {
		d = dirAnd
	}
	if first == "src" {
		p.expect("dst")
	} else {
		p.expect("src")
	}
	return d
}

// protocol is a protocol keyword without anything behind it.
func (p *parser) protocol(t token) cond {
	both := func(n uint8) cond {
		return disj{protoIPv4(p.behindTag, n), protoIPv6(p.behindTag, n)}
	}
	var c cond
	switch t.text {
	case "ip":
		c = etherType(p.behindTag, etherIPv4)
	case "ip6":
		c = etherType(p.behindTag, etherIPv6)
	case "arp":
		c = etherType(p.behindTag, etherARP)
	case "rarp":
		c = etherType(p.behindTag, etherRARP)
	case "tcp":
		c = both(protoTCP)
	case "udp":
		c = both(protoUDP)
	case "sctp":
		c = both(protoSCTP)
	case "pim":
		c = both(protoPIM)
	case "ah":
		c = both(protoAH)
	case "esp":
		c = both(protoESP)
	case "icmp":
		c = protoIPv4(p.behindTag, protoICMP)
	case "igmp":
		c = protoIPv4(p.behindTag, protoIGMP)
	case "vrrp", "carp":
		c = protoIPv4(p.behindTag, protoVRRP)
	case "icmp6":
		c = protoIPv6(p.behindTag, protoICMPv6)
	default:
		p.unexpected("host, src, dst or proto after ether")
		return nil
	}
	return p.inPacket(t, t.text, c)
}

// inPacket is a leaf that looks into the packet, and so behind the tag once
// vlan has been read.
func (p *parser) inPacket(t token, text string, c cond) cond {
	return &leaf{token: t, text: text, cond: c, needsTag: p.behindTag}
}

// value parses what qualifiers are applied to: an address, a port, a protocol,
// or several of them in parentheses.
func (p *parser) value(q qual) cond {
	if !p.enter() {
		return nil
	}
	defer p.leave()
	if p.accept("not") {
		return negation{p.value(q)}
	}
	if p.accept("(") {
		if p.isSymbol("(") && !p.numberInParentheses() {
			p.unexpected(q.wants()) // as libpcap has it
			return nil
		}
		c, _ := p.joined(p.value(q), q, func(q qual) (cond, qual) { return p.value(q), q })
		p.expect(")")
		return c
	}
	t := p.peek()
	if q.none && t.kind != kindEnd && t.kind != kindSymbol {
		p.noPrimitive()
		return nil
	}
	switch t.kind {
	case kindEnd, kindSymbol:
		if q.typ == "proto" && (protocols[t.text] != 0 || etherTypes[t.text] != 0) {
			p.fail(t, "%q is a keyword, write \\%s after proto,", t.text, t.text)
		} else {
			p.unexpected(q.wants())
		}
		return nil
	}
	p.take()
	switch q.typ {
	case "port", "portrange":
		return p.ports(t, q)
	case "proto":
		return p.protocolNumber(t, q)
	default:
		return p.address(t, q)
	}
}

// wants says what a value with these qualifiers looks like.
func (q qual) wants() string {
	switch q.typ {
	case "port":
		return "a port number or name"
	case "portrange":
		return "a port range such as 1-1023"
	case "proto":
		return "a protocol number or name"
	case "net":
		return "a network such as 10.0.0.0/8 or 2001:db8::/32"
	default:
		return "an address"
	}
}

// before prints the qualifiers in the order of the language.
func (q qual) before(typ string) string {
	var words []string
	for _, w := range []string{q.proto, string(q.dir), typ} {
		if w != "" {
			words = append(words, w)
		}
	}
	return strings.Join(words, " ") + " "
}

func (p *parser) address(t token, q qual) cond {
	switch t.kind {
	case kindMAC:
		return p.mac(t, q)
	case kindIPv6:
		return p.ipv6(t, q)
	case kindIPv4, kindNumber:
		return p.ipv4(t, q)
	case kindName:
		p.fail(t, "%q is not an address, and names are not resolved: give %s", t.text, q.wants())
	}
	return nil
}

func (p *parser) mac(t token, q qual) cond {
	if q.proto != "ether" || q.typ == "net" {
		p.fail(t, "an Ethernet address needs ether host, ether src or ether dst: %q", t.text)
		return nil
	}
	mac := macBytes(t.text)
	text := fmt.Sprintf("%s%02x:%02x:%02x:%02x:%02x:%02x", q.before("host"),
		mac[0], mac[1], mac[2], mac[3], mac[4], mac[5])
	return &leaf{token: t, text: text, cond: hostEther(mac, q.dir)}
}

// macBytes decodes what macRE matches.
func macBytes(s string) (mac [6]byte) {
	groups := strings.FieldsFunc(s, func(r rune) bool { return strings.ContainsRune(":-.", r) })
	hex := ""
	for _, g := range groups {
		if len(g)%2 == 1 {
			hex += "0"
		}
		hex += g
	}
	n, _ := strconv.ParseUint(hex, 16, 48) // macRE allows hexadecimal digits only
	for i := range mac {
		mac[i] = byte(n >> (40 - 8*i))
	}
	return mac
}

func (p *parser) ipv6(t token, q qual) cond {
	addr, err := netip.ParseAddr(t.text)
	if err != nil {
		p.fail(t, "malformed address %q", t.text)
		return nil
	}
	if q.proto != "" && q.proto != "ip6" {
		p.fail(t, "%s cannot have the IPv6 address %q", q.proto, t.text)
		return nil
	}
	bits, slash := p.prefixLen(128)
	if slash && q.typ != "net" {
		p.fail(t, "a prefix length needs net, not host, before %q", t.text)
		return nil
	}
	prefix := netip.PrefixFrom(addr, bits)
	if prefix.Masked().Addr() != addr {
		p.fail(t, "%s/%d has bits set behind its prefix, the network is %s", t.text, bits, prefix.Masked())
	}
	if p.err != nil {
		return nil
	}
	text := q.before("host") + addr.String()
	if slash {
		text = q.before("net") + prefix.String()
	}
	return p.inPacket(t, text, hostIPv6(etherType(p.behindTag, etherIPv6), prefix, q.dir))
}

// prefixLen parses /N, or returns most if there is none.
func (p *parser) prefixLen(most uint32) (bits int, slash bool) {
	if !p.accept("/") {
		return int(most), false
	}
	t := p.take()
	if t.kind != kindNumber || t.num > most {
		p.fail(t, "a prefix length from 0 to %d is expected, not %q,", most, t.text)
		return 0, true
	}
	return int(t.num), true
}

func (p *parser) ipv4(t token, q qual) cond {
	switch q.proto {
	case "", "ip", "arp", "rarp":
	default:
		p.fail(t, "%s cannot have the IPv4 address %q", q.proto, t.text)
		return nil
	}
	addr, bits := t.num, 32
	switch {
	case t.kind == kindIPv4:
		addr, bits = p.dotted(t)
	case q.typ == "net":
		// libpcap takes "net 10" for 10.0.0.0/8.
		for addr != 0 && addr>>24 == 0 {
			addr, bits = addr<<8, bits-8
		}
	}
	mask := leading(bits)
	if p.isSymbol("/", "mask") {
		if t.kind != kindIPv4 {
			p.fail(t, "a prefix length or mask needs a network with a dot, such as 10.0, not %q,", t.text)
			return nil
		}
		if q.typ != "net" {
			p.fail(t, "a prefix length or mask needs net, not host, before %q", t.text)
			return nil
		}
		mask = p.mask()
	}
	if addr&^mask != 0 {
		p.fail(t, "%q has bits set outside of its mask, the network is %s", t.text, ipv4String(addr&mask))
	}
	if p.err != nil {
		return nil
	}

	ip := hostIPv4(etherType(p.behindTag, etherIPv4), addr, mask, q.dir, 16, 20)
	arp := hostIPv4(etherType(p.behindTag, etherARP), addr, mask, q.dir, 18, 28)
	rarp := hostIPv4(etherType(p.behindTag, etherRARP), addr, mask, q.dir, 18, 28)
	c := map[string]cond{"": disj{ip, arp, rarp}, "ip": ip, "arp": arp, "rarp": rarp}[q.proto]
	return p.inPacket(t, q.ipv4Text(addr, mask), c)
}

func (q qual) ipv4Text(addr, mask uint32) string {
	for bits := range 33 {
		if leading(bits) != mask {
			continue
		}
		if bits == 32 {
			return q.before("host") + ipv4String(addr)
		}
		return fmt.Sprintf("%s%s/%d", q.before("net"), ipv4String(addr), bits)
	}
	return fmt.Sprintf("%s%s mask %s", q.before("net"), ipv4String(addr), ipv4String(mask))
}

// mask parses /N or mask A.
func (p *parser) mask() uint32 {
	if !p.accept("mask") {
		bits, _ := p.prefixLen(32)
		return leading(bits)
	}
	t := p.take()
	if t.kind != kindIPv4 {
		p.fail(t, "a mask such as 255.255.0.0 is expected, not %q,", t.text)
		return 0
	}
	m, _ := p.dotted(t)
	return m
}

// leading is a mask with that many bits set.
func leading(bits int) uint32 { return ^uint32(0) << (32 - bits) }

// dotted reads a full or partial IPv4 address and returns how many bits it has.
func (p *parser) dotted(t token) (addr uint32, bits int) {
	for part := range strings.SplitSeq(t.text, ".") {
		n, err := strconv.ParseUint(part, 10, 8)
		if err != nil || len(part) > 1 && part[0] == '0' {
			p.fail(t, "malformed IPv4 address %q: numbers from 0 to 255 without leading zeros are expected", t.text)
			return 0, 32
		}
		addr, bits = addr<<8|uint32(n), bits+8
	}
	return addr << (32 - bits), bits
}

func ipv4String(v uint32) string {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], v)
	return netip.AddrFrom4(b).String()
}

func (p *parser) ports(t token, q qual) cond {
	protos, ok := map[string][]uint8{"": onAny, "tcp": onTCP, "udp": onUDP, "sctp": {protoSCTP}}[q.proto]
	if !ok {
		p.fail(t, "%s has no ports, use tcp, udp or sctp", q.proto)
		return nil
	}
	var lo, hi uint16
	switch {
	case t.kind == kindNumber && t.num <= 65535:
		lo, hi = uint16(t.num), uint16(t.num)
	case t.kind == kindName && q.typ == "port":
		s, ok := services[t.text]
		if !ok {
			p.fail(t, "unknown port name %q, give its number", t.text)
			return nil
		}
		if len(s.protos) == 1 && len(protos) == 1 && s.protos[0] != protos[0] {
			p.fail(t, "port %q is not one of %s, give its number", t.text, q.proto)
			return nil
		}
		lo, hi = s.port, s.port
		if len(s.protos) == 1 {
			protos = s.protos
			q.proto = map[uint8]string{protoTCP: "tcp", protoUDP: "udp"}[protos[0]]
		}
	case t.kind == kindName && q.typ == "portrange":
		if lo, hi, ok = portRange(t.text); !ok {
			p.fail(t, "malformed port range %q: two numbers up to 65535 with - between them are expected", t.text)
			return nil
		}
	default:
		p.fail(t, "%s up to 65535 is expected, not %q,", q.wants(), t.text)
		return nil
	}
	text := q.before("port") + strconv.Itoa(int(lo))
	if lo != hi {
		text = fmt.Sprintf("%s%d-%d", q.before("portrange"), lo, hi)
	}
	return p.inPacket(t, text, ports(p.behindTag, protos, lo, hi, q.dir))
}

// portRange reads A-B; like libpcap it takes the ends in any order.
func portRange(s string) (lo, hi uint16, ok bool) {
	a, b, _ := strings.Cut(s, "-")
	port := func(s string) (uint16, bool) {
		n, err := strconv.ParseUint(s, 10, 16)
		return uint16(n), err == nil && (s == "0" || s[0] != '0')
	}
	lo, okLo := port(a)
	hi, okHi := port(b)
	return min(lo, hi), max(lo, hi), okLo && okHi
}

func (p *parser) protocolNumber(t token, q qual) cond {
	if q.proto == "ether" {
		return p.etherProto(t, q)
	}
	var n uint8
	switch {
	case t.kind == kindNumber && t.num <= 255:
		n = uint8(t.num)
	case t.kind == kindName && protocols[t.text] != 0:
		n = protocols[t.text]
	default:
		p.fail(t, "unknown protocol %q, give its number (up to 255)", t.text)
		return nil
	}
	var c cond
	switch q.proto {
	case "":
		c = disj{protoIPv4(p.behindTag, n), protoIPv6(p.behindTag, n)}
	case "ip":
		c = protoIPv4(p.behindTag, n)
	case "ip6":
		c = protoIPv6(p.behindTag, n)
	default:
		p.fail(t, "proto cannot follow %s, only ip, ip6 and ether", q.proto)
		return nil
	}
	return p.inPacket(t, q.before(q.typ)+strconv.Itoa(int(n)), c)
}

func (p *parser) etherProto(t token, q qual) cond {
	var n uint32
	switch t.kind {
	case kindNumber:
		n = t.num
	case kindName:
		n = uint32(etherTypes[t.text])
	}
	switch {
	case n > 0xffff || n < 0x600:
		p.fail(t, "unsupported Ethernet type %q: a number from 0x600 to 0xffff, \\ip, \\ip6, \\arp or \\rarp is expected", t.text)
		return nil
	case n == etherATalk || n == etherAARP:
		p.fail(t, "unsupported Ethernet type %q: libpcap looks for AppleTalk in SNAP frames too, which are not parsed,", t.text)
		return nil
	case isVLANTag(uint16(n)):
		p.fail(t, "the Ethernet type %q is that of a VLAN tag, use vlan", t.text)
		return nil
	}
	return p.inPacket(t, q.before(q.typ)+strconv.Itoa(int(n)), etherType(p.behindTag, uint16(n)))
}

func (p *parser) vlan() cond {
	t := p.take()
	if p.behindTag {
		p.fail(t, "a second vlan would look for a tag behind the first one, which is not supported: leave it out")
		return nil
	}
	l := &leaf{token: t, text: "vlan", cond: flagSet(FlagVLAN), vlan: true}
	if p.numberAhead() {
		id := p.number()
		if id.num > 0xfff {
			p.fail(id, "VLAN id %q is above 4095", id.text)
			return nil
		}
		l.text = fmt.Sprintf("vlan %d", id.num)
		l.cond = conj{l.cond, equal(fieldVLAN, avail{}, id.num)}
		l.vlanID = true
	}
	p.behindTag = true
	return l
}

// numberAhead reports whether a number follows, perhaps in parentheses.
func (p *parser) numberAhead() bool {
	i := 0
	for p.peekAt(i).kind == kindSymbol && p.peekAt(i).text == "(" {
		i++
	}
	return p.peekAt(i).kind == kindNumber
}

// numberInParentheses reports whether parentheses around a number and nothing else follow.
func (p *parser) numberInParentheses() bool {
	open := 0
	for p.peekAt(open).text == "(" {
		open++
	}
	for i := range open {
		if p.peekAt(open+1+i).text != ")" {
			return false
		}
	}
	return p.peekAt(open).kind == kindNumber
}

// number parses a number, perhaps in parentheses.
func (p *parser) number() token {
	open := 0
	for p.accept("(") {
		open++
	}
	t := p.take()
	for range open {
		p.expect(")")
	}
	return t
}

// length is less N or greater N, which both include N.
func (p *parser) length() cond {
	t := p.take()
	n := p.take()
	if n.kind != kindNumber {
		p.fail(n, "a number of bytes is expected after %s, not %q,", t.text, n.text)
		return nil
	}
	op := asm.JLE
	if t.text == "greater" {
		op = asm.JGE
	}
	return &leaf{token: t, text: fmt.Sprintf("%s %d", t.text, n.num), cond: test{field: fieldLen, op: op, k: n.num}}
}
