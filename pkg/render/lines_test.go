package render

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/nftrace/nftrace/pkg/events"
)

// partOf is a part at a place in which a packet met these rules of these tables.
func partOf(place *events.Place, p *events.Packet, tables ...[]events.Rule) []events.Step {
	var part []events.Step
	in := &events.Part{Before: *p}
	for _, rules := range tables {
		part = append(part, events.Step{Place: place, Kind: events.StepTable, Verdict: events.NFAccept, Table: &events.TableRun{
			Name: "filter", Part: in, Before: p, Rules: rules, Met: []events.Met{{Pkt: p}},
		}})
	}
	return part
}

func rulesNamed(place *events.Place, chains ...string) []events.Rule {
	var rules []events.Rule
	for i, c := range chains {
		rules = append(rules, events.Rule{Chain: c, Type: events.TypeRule, Num: i + 1})
	}
	s := partOf(place, &events.Packet{}, rules)[0]
	for i := range rules {
		rules[i].TracePrefix = TracePrefix(&s, &rules[i])
	}
	return rules
}

// linesPrinter prints parts as one Renderer does, and checks that each is what it is when
// nothing was printed before.
type linesPrinter struct {
	*testing.T
	r Renderer
}

func (t *linesPrinter) print(what string, part []events.Step) {
	t.Helper()
	j := &events.Journey{Steps: part}
	var want bytes.Buffer
	if err := Trace(&want, j); err != nil {
		t.Fatal(err)
	}
	if got := string(t.r.Append([]byte("before\n"), j)); got != "before\n"+want.String() {
		t.Fatalf("%s:\n got %q\nwant %q", what, got, want.String())
	}
}

// Lines that are printed again are those of the packet.
func TestLinesOfPackets(t *testing.T) {
	p := &linesPrinter{t, NewTrace(TraceOptions{})}
	packets := similarPackets()
	places := append(similarPlaces(), &events.Place{PF: events.PFIPv4, Hook: events.HookForward, In: events.Device{Index: 2, Name: "eth1"}})
	rules := map[uint8][]events.Rule{} // the same at all places, if they are the same
	for _, place := range places {
		if rules[place.Hook] == nil {
			rules[place.Hook] = rulesNamed(place, "A", "B")
		}
	}
	for _, place := range places {
		for i := range packets {
			for k := range packets {
				for _, n := range []int{i, i, i, k, k, k, i} {
					p.print("a packet behind another", partOf(place, &packets[n], rules[place.Hook], rules[place.Hook][:1]))
				}
			}
		}
	}
	for _, before := range places {
		for _, place := range places {
			for _, at := range []*events.Place{before, before, before, place, place, place} {
				p.print("a place behind another", partOf(at, &packets[0], rules[at.Hook]))
			}
		}
	}
	port := places[2]
	part := partOf(port, &packets[0], rules[port.Hook])
	for range 3 {
		p.print("a port", part)
	}
	port.PhysIn.Name = "veth2"
	p.print("a port whose name became known", part)
}

// Lines that are printed again are those of the rules.
func TestLinesOfRules(t *testing.T) {
	place := similarPlaces()[0]
	pkt := similarPackets()[0]
	a, b, long := rulesNamed(place, "A", "B"), rulesNamed(place, "C", "B"), rulesNamed(place, strings.Repeat("x", 200), "B")
	other := with(pkt, func(p *events.Packet) { p.Mark = 7 })
	ttl := with(pkt, func(p *events.Packet) { p.Data = bytes.Clone(p.Data); p.Data[8]-- })
	tracked := with(pkt, func(p *events.Packet) { p.CT = "NEW" })
	changed := func(f func(part []events.Step)) []events.Step {
		part := partOf(place, &pkt, a, b)
		f(part)
		return part
	}
	parts := [][]events.Step{
		partOf(place, &pkt, a),
		partOf(place, &pkt, a[:1]),
		partOf(place, &pkt, b),
		partOf(place, &pkt, long),
		partOf(place, &pkt, a, b),
		partOf(place, &pkt, b, a),
		partOf(place, &pkt, a, b, a),
		partOf(place, &pkt, slices.Repeat(a, maxLines)),
		changed(func(part []events.Step) { part[1].Table.Met[0].Pkt = &tracked }),
		changed(func(part []events.Step) { part[1].Table.Met[0].Pkt = &other }),
		changed(func(part []events.Step) { part[1].Table.Met[0].Pkt = &ttl }),
		changed(func(part []events.Step) { part[1].Table.Met[0].Pkt = nil }),
		changed(func(part []events.Step) {
			part[1].Table.Met = append(part[1].Table.Met, events.Met{From: 1, Pkt: &other})
		}),
		changed(func(part []events.Step) { part[1].Table.Met[0].From = 1 }),
		changed(func(part []events.Step) { part[0].Table.Unresolved = "why" }),
		changed(func(part []events.Step) { part[1].Table.Rules, part[1].Table.Met = nil, nil }),
		changed(func(part []events.Step) { part[1].Table.Rules = nil }),
		changed(func(part []events.Step) { part[1].Table.Part = nil }),
		changed(func(part []events.Step) { part[1].Place = similarPlaces()[2] }),
	}
	p := &linesPrinter{t, NewTrace(TraceOptions{})}
	for _, x := range parts {
		for _, y := range parts {
			for _, part := range [][]events.Step{x, x, x, y, y, y, x} {
				p.print("a part behind another", part)
			}
		}
	}
}

// The lines about a flow's packets are printed once, and no text is kept of a packet
// that is the only one.
func TestLinesKept(t *testing.T) {
	place, pkt := similarPlaces()[0], similarPackets()[0]
	m := &logBuf{lines: new([1 << linesBits]lines)}
	part := partOf(place, &pkt, rulesNamed(place, "A", "B"))
	l, _ := m.linesAt(part)
	for i, want := range []struct{ kept, anew bool }{{false, true}, {true, true}, {true, false}} {
		pkt.Data[5]++ // of its identification
		m.appendTrace(nil, &events.Journey{Steps: part})
		if got := len(l.text) > 0; got != want.kept {
			t.Errorf("packet %d: text kept: %v", i, got)
		}
		if got := m.pkt != nil; got != want.anew {
			t.Errorf("packet %d: printed anew: %v", i, got)
		}
	}
	if l, _ := m.linesAt(partOf(place, &pkt, slices.Repeat(rulesNamed(place, "A"), maxLines+1))); l != nil {
		t.Errorf("more than %d lines are kept", maxLines)
	}
}
