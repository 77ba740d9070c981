package main

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"

	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/symbolize"
)

func mark(value, mask uint32) rule {
	return rule{target: "MARK", rev: 2, data: binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, value), mask)}
}

func ttl(mode, n byte) rule { return rule{target: "TTL", data: []byte{mode, n, 0, 0}} }

func data(hops byte) []byte {
	b := make([]byte, 20)
	b[0], b[8], b[9] = 0x45, hops, 1
	copy(b[12:], netip.MustParseAddr("10.0.0.1").AsSlice())
	copy(b[16:], netip.MustParseAddr("10.0.0.2").AsSlice())
	return b
}

// Each rule gets the packet as it was before its own target ran.
func TestPacketsOf(t *testing.T) {
	unknown := rule{target: "NOBODYKNOWS"}
	type want struct {
		mark   uint32
		ttl    byte
		unsure string // a part of it
	}
	for _, tt := range []struct {
		name  string
		rules []rule
		after *events.Packet // nil: gone
		want  []want
	}{
		{"nothing changes", []rule{{}, {target: "LOG"}}, pkt(0, 64), []want{{0, 64, ""}, {0, 64, ""}, {0, 64, ""}}},
		{"one mark", []rule{{}, mark(7, 0xffffffff)}, pkt(7, 64), []want{{0, 64, ""}, {0, 64, ""}, {7, 64, ""}}},
		{"marks add up", []rule{mark(0x10, 0xf0), mark(0x01, 0x0f), mark(0x20, 0x20)}, pkt(0x31, 64),
			[]want{{0, 64, ""}, {0x10, 64, ""}, {0x11, 64, ""}, {0x31, 64, ""}}},
		{"ttl", []rule{ttl(2, 3), ttl(0, 9)}, pkt(0, 9), []want{{0, 64, ""}, {0, 61, ""}, {0, 9, ""}}},
		{"mark and ttl, dropped", []rule{mark(1, 0xffffffff), ttl(1, 1), {target: "DROP"}}, nil,
			[]want{{0, 64, ""}, {1, 64, ""}, {1, 65, ""}}},
		// The last that changes it left what the table left, whatever it does.
		{"unknown, but the last", []rule{mark(1, 0xffffffff), unknown}, pkt(5, 60), []want{{0, 64, ""}, {1, 64, ""}, {5, 60, ""}}},
		{"unknown, and gone", []rule{unknown, {target: "DROP"}}, nil, []want{{0, 64, ""}, {0, 0, "NOBODYKNOWS"}}},
		{"unknown in the middle", []rule{unknown, {}, mark(1, 0xffffffff)}, pkt(1, 64),
			[]want{{0, 64, ""}, {0, 0, "NOBODYKNOWS"}, {0, 0, "NOBODYKNOWS"}, {1, 64, ""}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for i := range tt.rules {
				tt.rules[i].cond = tt.rules[i].target != "DROP" // else those behind it are dead
			}
			table := inputTable(t, tt.rules, nil)
			run := &events.TableRun{Before: *pkt(0, 64), After: events.Packet{}}
			if tt.after != nil {
				run.After = *tt.after
			}
			var visits []symbolize.Visit
			for i := range tt.want { // the policy is the entry behind the rules
				visits = append(visits, symbolize.Visit{Index: i})
			}
			run.Rules = make([]events.Rule, len(visits))
			packetsOf(table, visits, run)
			for i, w := range tt.want {
				r := &run.Rules[i]
				if w.unsure != "" {
					if r.Pkt != nil || !strings.Contains(r.PktUnsure, w.unsure) {
						t.Errorf("rule %d: %+v, %q, want unsure because of %s", i+1, r.Pkt, r.PktUnsure, w.unsure)
					}
					continue
				}
				if r.Pkt == nil || r.PktUnsure != "" {
					t.Errorf("rule %d: %+v, %q", i+1, r.Pkt, r.PktUnsure)
				} else if r.Pkt.Mark != w.mark || r.Pkt.Data[8] != w.ttl {
					t.Errorf("rule %d: mark %#x ttl %d, want %#x %d", i+1, r.Pkt.Mark, r.Pkt.Data[8], w.mark, w.ttl)
				}
			}
			if run.Before.Mark != 0 || run.Before.Data[8] != 64 {
				t.Error("the packet before was changed")
			}
		})
	}
}

func pkt(mark uint32, hops byte) *events.Packet {
	return &events.Packet{Family: events.PFIPv4, Len: 20, Mark: mark, Data: data(hops)}
}

// walk takes hits for what they are only if they fit one packet.
func TestWalkChecksCounters(t *testing.T) {
	table := inputTable(t, []rule{{cond: true, target: "jump U"}}, []rule{{cond: true, target: "ACCEPT"}})
	step := aRun(0, us, nil)
	for _, tt := range []struct {
		hits []events.Hit
		want string // a part of the error
	}{
		{hits(1, 1), ""},
		{hits(0, 1, 3, 1), ""},
		{hits(0, 1, 1, 1, 4, 1), ""},
		{hits(0, 1, 1, 1), "no path"},
		{hits(1, 2), "no path"},
		{[]events.Hit{{Index: 1, Packets: 1, Bytes: 85}}, "do not fit one packet"},
		{hits(99, 1), "entries, the counters more"},
	} {
		_, err := walk(table, step, tt.hits)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%v: %v, want %q", tt.hits, err, tt.want)
		}
	}
	// The table's own targets may have made it longer.
	step.Table.After.Len = 100
	if _, err := walk(table, step, []events.Hit{{Index: 1, Packets: 1, Bytes: 100}}); err != nil {
		t.Error(err)
	}
}
