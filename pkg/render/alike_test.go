package render

import (
	"bytes"
	"strings"
	"testing"

	"github.com/nftrace/nftrace/pkg/events"
)

// similarPackets are packets that differ in little.
func similarPackets() []events.Packet {
	udp := func(change func(h *v4, p *events.Packet)) events.Packet {
		h := v4{id: 123, frag: 0x4000, ttl: 64, proto: protoUDP, src: c2, dst: c1, l4: raw("e557 1267 0028 ee41", strings.Repeat("61", 32))}
		p := events.Packet{}
		change(&h, &p)
		q := pkt4(h.bytes())
		q.MAC, q.MACDevType, q.Mark, q.HasOwner, q.UID, q.GID = dockMAC, 1, p.Mark, p.HasOwner, p.UID, p.GID
		if p.Len != 0 {
			q.Len = p.Len
		}
		if p.MAC != nil {
			q.MAC = p.MAC
		}
		if p.MACDevType != 0 {
			q.MACDevType = p.MACDevType
		}
		if p.Data != nil {
			q.Data = q.Data[:len(p.Data)]
		}
		return q
	}
	return []events.Packet{
		udp(func(*v4, *events.Packet) {}),
		udp(func(h *v4, _ *events.Packet) { h.ttl-- }),
		udp(func(h *v4, _ *events.Packet) { h.ttl = 100 }),
		udp(func(h *v4, _ *events.Packet) { h.ttl = 0 }),
		udp(func(h *v4, _ *events.Packet) { h.id = 0 }),
		udp(func(h *v4, _ *events.Packet) { h.id = 65535 }),
		udp(func(h *v4, _ *events.Packet) { h.tos = 0x10 }),
		udp(func(h *v4, _ *events.Packet) { h.frag = 0 }),
		udp(func(h *v4, _ *events.Packet) { h.frag = 0x2000 }),
		udp(func(h *v4, _ *events.Packet) { h.frag = 3 }),
		udp(func(h *v4, _ *events.Packet) { h.proto = protoUDPLite }),
		udp(func(h *v4, _ *events.Packet) { h.proto = protoICMP }),
		udp(func(h *v4, _ *events.Packet) { h.proto = protoTCP }),
		udp(func(h *v4, _ *events.Packet) { h.src = "172.17.0.4" }),
		udp(func(h *v4, _ *events.Packet) { h.dst = "172.17.0.4" }),
		udp(func(h *v4, _ *events.Packet) { h.opts = raw("01010101") }),
		udp(func(h *v4, _ *events.Packet) { h.l4[1]++ }),
		udp(func(h *v4, _ *events.Packet) { h.l4[3]++ }),
		udp(func(h *v4, _ *events.Packet) { h.l4[5]++ }),
		udp(func(h *v4, _ *events.Packet) { h.l4[20]++ }),
		udp(func(h *v4, _ *events.Packet) { h.l4 = h.l4[:8] }),
		udp(func(h *v4, _ *events.Packet) { h.l4 = h.l4[:5] }),
		udp(func(h *v4, _ *events.Packet) { h.l4 = nil }),
		udp(func(_ *v4, p *events.Packet) { p.Len = 61 }),
		udp(func(_ *v4, p *events.Packet) { p.Len = 25 }),
		udp(func(_ *v4, p *events.Packet) { p.Data = make([]byte, 30) }),
		udp(func(_ *v4, p *events.Packet) { p.Data = make([]byte, 25) }),
		udp(func(_ *v4, p *events.Packet) { p.Data = make([]byte, 15) }),
		udp(func(_ *v4, p *events.Packet) { p.Data = make([]byte, 0) }),
		udp(func(_ *v4, p *events.Packet) { p.Mark = 1 }),
		udp(func(_ *v4, p *events.Packet) { p.HasOwner = true }),
		udp(func(_ *v4, p *events.Packet) { p.HasOwner, p.UID = true, 1000 }),
		udp(func(_ *v4, p *events.Packet) { p.HasOwner, p.GID = true, 1000 }),
		udp(func(_ *v4, p *events.Packet) { p.MAC = raw("0242ac110003 0242ac110002 86dd") }),
		udp(func(_ *v4, p *events.Packet) { p.MAC = []byte{} }),
		udp(func(_ *v4, p *events.Packet) { p.MACDevType = arphrdSIT }),
		// An error about a packet, cut off or not: its inner TTL and identification are not the packet's.
		pkt4(v4{id: 1, ttl: 64, proto: protoICMP, src: c1, dst: c2, l4: append(raw("0301 0000 00000000"), v4{id: 9, ttl: 7, proto: protoUDP, src: c2, dst: c1, l4: raw("e557 1267 0028 ee41")}.bytes()...)}.bytes()),
		pkt4(v4{id: 1, ttl: 64, proto: protoICMP, src: c1, dst: c2, l4: append(raw("0301 0000 00000000"), v4{id: 8, ttl: 6, proto: protoUDP, src: c2, dst: c1, l4: raw("e557 1267 0028 ee41")}.bytes()...)}.bytes()),
		pkt4(v4{id: 1, ttl: 64, proto: protoICMP, src: c1, dst: c2, l4: append(raw("0301 0000 00000000"), v4{id: 8, ttl: 6, proto: protoUDP, src: c2, dst: c1}.bytes()...)}.bytes()),
		pkt6(v6{first: "60000000", next: protoUDP, hop: 64, src: g1, dst: g2, rest: raw("e557 1267 0008 ee41")}.bytes()),
		pkt6(v6{first: "60000000", next: protoUDP, hop: 63, src: g1, dst: g2, rest: raw("e557 1267 0008 ee41")}.bytes()),
	}
}

func similarPlaces() []*events.Place {
	eth0, bridge := events.Device{Index: 2, Name: "eth0"}, events.Device{Index: 3, Name: "br0"}
	return []*events.Place{
		{PF: events.PFIPv4, Hook: events.HookForward, In: eth0, Out: bridge},
		{PF: events.PFIPv4, Hook: events.HookLocalOut, Out: eth0},
		{PF: events.PFIPv4, Hook: events.HookForward, In: bridge, Out: eth0, PhysIn: events.Device{Index: 4, Name: "veth1"}},
		{PF: events.PFIPv4, Hook: events.HookForward, In: events.Device{Index: 5, Name: "e\x1b"}, Out: eth0},
		{PF: events.PFIPv4, Hook: events.HookForward, In: eth0, Out: events.Device{Index: 6, Name: strings.Repeat("x", 900)}},
		{PF: events.PFBridge, Hook: events.HookForward, In: eth0, Out: bridge},
		{PF: events.PFIPv6, Hook: events.HookForward, In: eth0, Out: bridge},
	}
}

// What was printed before makes no difference to a line.
func TestTraceAgain(t *testing.T) {
	packets, places := similarPackets(), similarPlaces()
	journey := func(place *events.Place, p events.Packet) *events.Journey {
		s := traceStep(place.PF, p)
		s.Place = place
		s.Table.Rules[0].TracePrefix = TracePrefix(&s, &s.Table.Rules[0])
		return &events.Journey{Steps: []events.Step{s}}
	}
	r := NewTrace(TraceOptions{})
	print := func(place *events.Place, p events.Packet) string { return string(r.Append(nil, journey(place, p))) }
	fresh := map[*events.Place][]string{}
	for _, place := range places {
		for _, p := range packets {
			var b bytes.Buffer
			if err := Trace(&b, journey(place, p)); err != nil {
				t.Fatal(err)
			}
			fresh[place] = append(fresh[place], b.String())
		}
	}
	for _, before := range places {
		for _, place := range places {
			for i, p := range packets {
				for k, q := range packets {
					print(before, p)
					if got, want := print(place, q), fresh[place][k]; got != want {
						t.Fatalf("packet %d behind %d:\n got %q\nwant %q", k, i, got, want)
					}
				}
			}
		}
	}

	// A port whose name became known.
	place := places[2]
	print(place, packets[0])
	place.PhysIn.Name = "veth2"
	if got := print(place, packets[0]); !strings.Contains(got, " PHYSIN=veth2 ") {
		t.Errorf("got %q", got)
	}
}

// Most of what a forwarded packet's lines say is not printed again.
func TestAlike(t *testing.T) {
	s := traceStep(events.PFIPv4, pkt4(echo4.bytes()))
	p := s.Table.Met[0].Pkt
	q := *p
	q.Data = bytes.Clone(p.Data)
	q.Data[8]--
	m := new(logBuf)
	m.packet(&s, p)
	if !m.alike.ok || !m.alike.to(&s, &q) {
		t.Error("a packet with another TTL is not alike")
	}
}
