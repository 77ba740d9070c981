package events

import (
	"encoding/binary"
	"net/netip"
)

// Tuple reads addresses and ports of an IP packet; ICMP's identifier stands for
// both ports. Extension headers of IPv6 are stepped over: Proto is what is behind them.
// later is set for fragments other than the first, which have no ports. The addresses
// of what is no IP packet, or not whole, are not valid.
func (p *Packet) Tuple() (t Tuple, later bool) {
	b := p.Data
	var src, dst netip.Addr
	var l4 []byte
	switch {
	case p.Family == PFIPv4 && len(b) >= 20:
		src, _ = netip.AddrFromSlice(b[12:16])
		dst, _ = netip.AddrFromSlice(b[16:20])
		t.Proto = b[9]
		later = binary.BigEndian.Uint16(b[6:])&0x1fff != 0
		if ihl := int(b[0]&0xf) * 4; ihl >= 20 && ihl <= len(b) && !later {
			l4 = b[ihl:]
		}
	case p.Family == PFIPv6 && len(b) >= 40:
		src, _ = netip.AddrFromSlice(b[8:24])
		dst, _ = netip.AddrFromSlice(b[24:40])
		t.Proto, l4, later = ipv6Payload(b[6], b[40:])
	}
	var sport, dport uint16
	switch t.Proto {
	case 6, 17, 33, 132, 136: // TCP, UDP, DCCP, SCTP, UDP-Lite
		if len(l4) >= 4 {
			sport, dport = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:])
		}
	case 1, 58: // ICMP: the identifier stands for both ports
		if len(l4) >= 6 {
			sport = binary.BigEndian.Uint16(l4[4:])
			dport = sport
		}
	}
	t.Src, t.Dst = netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport)
	return t, later
}

// fragment reports that p is one, the first or another.
func (p *Packet) fragment() bool {
	b := p.Data
	switch {
	case p.Family == PFIPv4 && len(b) >= 20:
		return binary.BigEndian.Uint16(b[6:])&0x3fff != 0
	case p.Family == PFIPv6 && len(b) >= 40:
		next := b[6]
		b = b[40:]
		for range 8 {
			switch {
			case next == 44:
				return len(b) < 4 || binary.BigEndian.Uint16(b[2:])&0xfff9 != 0 // else it waits for no others
			case next != 0 && next != 43 && next != 60, len(b) < 8, len(b) < 8+int(b[1])*8:
				return false // behind an authentication header is no fragment's
			}
			next, b = b[0], b[8+int(b[1])*8:]
		}
	}
	return false
}

// ipv6Payload walks the extension headers; there is no payload in later fragments
// and where the headers are cut off.
func ipv6Payload(next uint8, b []byte) (proto uint8, payload []byte, later bool) {
	for range 8 {
		switch next {
		case 0, 43, 60: // hop-by-hop, routing, destination options
			if len(b) < 8 || len(b) < 8+int(b[1])*8 {
				return next, nil, false
			}
			next, b = b[0], b[8+int(b[1])*8:]
		case 51: // authentication
			if len(b) < 8 || len(b) < 8+int(b[1])*4 {
				return next, nil, false
			}
			next, b = b[0], b[8+int(b[1])*4:]
		case 44: // fragment
			if len(b) < 8 {
				return next, nil, false
			}
			if binary.BigEndian.Uint16(b[2:])&0xfff8 != 0 {
				return b[0], nil, true
			}
			next, b = b[0], b[8:]
		default:
			return next, b, false
		}
	}
	return next, nil, false
}
