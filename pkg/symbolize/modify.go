package symbolize

import (
	"bytes"
	"encoding/binary"
)

// leavesPacket lists the targets that change nothing that TRACE prints.
// (CHECKSUM changes checksums, which it does not print.)
var leavesPacket = map[string]bool{
	"AUDIT": true, "CHECKSUM": true, "CLASSIFY": true, "CONNSECMARK": true, "CT": true, "IDLETIMER": true,
	"LED": true, "LOG": true, "NFLOG": true, "NOTRACK": true, "RATEEST": true, "SECMARK": true,
	"SYNPROXY": true, "TEE": true, "TRACE": true,
}

// Modifies reports whether e's target may change what TRACE prints of the
// packet for the visits that follow. Targets nobody knows may.
func (e *Entry) Modifies() bool {
	if e.GivesSocket() {
		return true // and the packet goes on to the next table
	}
	if e.Kind != TargetExtension || endsOf(e) == endsAlways || leavesPacket[e.Target] {
		return false
	}
	switch e.Target {
	case "CONNMARK":
		return e.RestoresMark()
	case "SET":
		// Only revision 3 has --map-set, which may set the mark.
		return e.Revision >= 3 && setMaps(e.Data)
	}
	return true
}

// GivesSocket reports whether e's target gives the packet a socket, whose owner TRACE prints from then
// on.
func (e *Entry) GivesSocket() bool { return e.Kind == TargetExtension && e.Target == "TPROXY" }

// setMaps reports that struct xt_set_info_target_v3 names a set to map with.
func setMaps(b []byte) bool {
	d := dec{b: b}
	// Three struct xt_set_info of 4 bytes; ip_set_id_t of the third.
	return d.u16(8) != 0xffff || d.bad
}

// Apply does to a packet what entry i's target does to it: mark is skb->mark,
// data the packet from its network header on, as far as it was captured. ok
// is false where the outcome cannot be told (it needs the conntrack entry,
// the route's MTU, bytes that were not captured, a target nobody knows).
// data is not written to; without a change it is returned as it is. Of
// checksums only IPv4's own is kept right.
func (t *Table) Apply(i int, mark uint32, data []byte) (newMark uint32, newData []byte, ok bool) {
	e := &t.Entries[i]
	if !e.Modifies() {
		return mark, data, true
	}
	if e.Target == "MARK" {
		// net/netfilter/xt_mark.c:mark_tg; revisions before 2 are long gone.
		d := dec{b: e.Data}
		v, mask := d.u32(0), d.u32(4)
		return mark&^mask ^ v, data, e.Revision == 2 && !d.bad
	}
	if e.Target == "TPROXY" {
		// net/netfilter/xt_TPROXY.c:tproxy_tg4, tproxy_tg6_v1, where they accept
		d := dec{b: e.Data}
		mask, v := d.u32(0), d.u32(4)
		return mark&^mask ^ v, data, !d.bad
	}
	if t.Family == ARP {
		data, ok = mangleARP(e, data)
		return mark, data, ok
	}
	p := packet{v6: t.Family == IPv6, b: bytes.Clone(data)}
	if !p.whole() || !p.run(e) {
		return mark, data, false
	}
	p.checksum()
	return mark, p.b, true
}

type packet struct {
	v6 bool
	b  []byte
}

func (p *packet) whole() bool {
	if p.v6 {
		return len(p.b) >= 40 && p.b[0]>>4 == 6
	}
	return len(p.b) >= 20 && p.b[0]>>4 == 4 && p.b[0]&15 >= 5 && len(p.b) >= p.headerLen()
}

func (p *packet) headerLen() int { return int(p.b[0]&15) * 4 }

func (p *packet) run(e *Entry) bool {
	d := dec{b: e.Data}
	switch e.Target {
	case "TTL": // net/netfilter/xt_HL.c:ttl_tg
		return !p.v6 && hopLimit(&p.b[8], d.u8(0), d.u8(1)) && !d.bad
	case "HL": // hl_tg6
		return p.v6 && hopLimit(&p.b[7], d.u8(0), d.u8(1)) && !d.bad
	case "TOS": // net/netfilter/xt_DSCP.c:tos_tg
		p.setDS(p.ds()&^d.u8(1) ^ d.u8(0))
		return e.Revision == 1 && !d.bad
	case "DSCP": // dscp_tg
		p.setDS(p.ds()&3 | d.u8(0)<<2)
		return e.Revision == 0 && !d.bad
	case "ECN":
		return p.ecn(&d)
	case "TCPOPTSTRIP":
		return p.optStrip(&d)
	}
	return false
}

func hopLimit(p *byte, mode, n uint8) bool {
	v := int(*p)
	switch mode {
	case 0:
		v = int(n)
	case 1:
		v = min(v+int(n), 255)
	case 2:
		v = max(v-int(n), 0)
	default:
		return false
	}
	*p = byte(v)
	return true
}

func (p *packet) ds() uint8 {
	if p.v6 {
		return p.b[0]<<4 | p.b[1]>>4
	}
	return p.b[1]
}

func (p *packet) setDS(v uint8) {
	if p.v6 {
		p.b[0], p.b[1] = p.b[0]&0xf0|v>>4, p.b[1]&0x0f|v<<4
		return
	}
	p.b[1] = v
}

// ecn mirrors net/ipv4/netfilter/ipt_ECN.c:ecn_tg.
func (p *packet) ecn(d *dec) bool {
	const setIP, setECE, setCWR = 0x01, 0x10, 0x20
	op, ect, tcp := d.u8(0), d.u8(1), d.u8(2) // tcp: bit 0 ece, bit 1 cwr
	if p.v6 || d.bad {
		return false
	}
	if op&setIP != 0 {
		p.b[1] = p.b[1]&^3 | ect&3
	}
	if op&(setECE|setCWR) == 0 || p.b[9] != 6 {
		return true
	}
	// A bit field of the machine's: little-endian fills from bit 0.
	ece, cwr := tcp&1, tcp>>1&1
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		ece, cwr = tcp>>7&1, tcp>>6&1
	}
	h := p.headerLen()
	if p.fragment() || len(p.b) < h+20 {
		return false
	}
	flags := &p.b[h+13]
	if op&setECE != 0 {
		*flags = *flags&^0x40 | ece<<6
	}
	if op&setCWR != 0 {
		*flags = *flags&^0x80 | cwr<<7
	}
	return true
}

func (p *packet) fragment() bool { return binary.BigEndian.Uint16(p.b[6:])&0x1fff != 0 }

// optStrip mirrors net/netfilter/xt_TCPOPTSTRIP.c:tcpoptstrip_mangle_packet
// for IPv4, and for IPv6 without extension headers.
func (p *packet) optStrip(d *dec) bool {
	h := 40
	if !p.v6 {
		h = p.headerLen()
		if p.fragment() {
			return true
		}
	} else if p.b[6] != 6 {
		return false
	}
	if len(p.b) < h+20 {
		return false
	}
	size := int(p.b[h+12]>>4) * 4
	if size < 20 || len(p.b) < h+size {
		return false
	}
	tcp := p.b[h : h+size]
	for i := 20; i < size-1; {
		n := int(tcp[i+1])
		if tcp[i] <= 1 || n == 0 {
			n = 1
		}
		if i+n > size {
			break
		}
		if d.u32(int(tcp[i])/32*4)&(1<<(tcp[i]%32)) != 0 {
			for j := range n {
				tcp[i+j] = 1 // TCPOPT_NOP
			}
		}
		i += n
	}
	return !d.bad
}

// checksum keeps the IPv4 header's checksum right.
func (p *packet) checksum() {
	if p.v6 {
		return
	}
	h := p.b[:p.headerLen()]
	h[10], h[11] = 0, 0
	var sum uint32
	for i := 0; i < len(h); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(h[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(h[10:], ^uint16(sum))
}
