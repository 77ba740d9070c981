package main

import (
	"encoding/binary"
	"slices"
	"testing"
	"time"

	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/symbolize"
)

// rule is a rule of the IPv4 tables that these tests make up, in the chain INPUT
// or behind it in the only user chain, U.
type rule struct {
	cond   bool   // it has a condition, so a packet may pass it by
	target string // ACCEPT, DROP, RETURN, "jump U", "" or an extension's name
	rev    byte
	data   []byte
}

// inputTable lays out struct ipt_replace's entries: INPUT with its policy, U, the end.
func inputTable(t testing.TB, input, user []rule) *symbolize.Table {
	t.Helper()
	const size, targetOffset, nextOffset = 112, 88, 90 // struct ipt_entry
	var blob []byte
	n := uint32(0)
	var jumps []int
	extension := func(name string, rev byte, data []byte) []byte {
		b := make([]byte, (32+len(data)+7)&^7)
		binary.NativeEndian.PutUint16(b, uint16(len(b)))
		copy(b[2:31], name)
		b[31] = rev
		copy(b[32:], data)
		return b
	}
	add := func(r rule) {
		e := make([]byte, size)
		if r.cond {
			e[0], e[8] = 10, 0xff // -s 10.0.0.0/8
		}
		verdict, standard := map[string]int32{"ACCEPT": -2, "DROP": -1, "RETURN": -5, "jump U": 0, "": 0}[r.target]
		if standard {
			switch r.target {
			case "jump U":
				jumps = append(jumps, len(blob)+size+32)
			case "":
				verdict = int32(len(blob) + size + 40)
			}
			e = append(e, extension("", 0, binary.NativeEndian.AppendUint32(nil, uint32(verdict)))...)
		} else {
			e = append(e, extension(r.target, r.rev, r.data)...)
		}
		binary.NativeEndian.PutUint16(e[targetOffset:], size)
		binary.NativeEndian.PutUint16(e[nextOffset:], uint16(len(e)))
		blob = append(blob, e...)
		n++
	}
	name := func(s string) []byte { return append([]byte(s), make([]byte, 30-len(s))...) }
	info := symbolize.Info{ValidHooks: 1 << events.HookLocalIn}
	for _, r := range input {
		add(r)
	}
	info.Underflow[events.HookLocalIn] = uint32(len(blob))
	add(rule{target: "ACCEPT"})
	if user != nil {
		add(rule{target: "ERROR", data: name("U")})
		for _, j := range jumps {
			binary.NativeEndian.PutUint32(blob[j:], uint32(len(blob)))
		}
		for _, r := range user {
			add(r)
		}
		add(rule{target: "RETURN"})
	}
	add(rule{target: "ERROR", data: name("ERROR")})
	info.NumEntries, info.Size = n, uint32(len(blob))
	table, err := symbolize.ParseTable(symbolize.IPv4, "filter", info, blob)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

// hits makes one hit of n packets of 84 bytes of each index: "index, n, index, n …".
func hits(in ...int) []events.Hit {
	out := []events.Hit{}
	for i := 0; i < len(in); i += 2 {
		out = append(out, events.Hit{Index: in[i], Packets: uint64(in[i+1]), Bytes: uint64(84 * in[i+1])})
	}
	return out
}

func TestSubtract(t *testing.T) {
	for _, tt := range []struct{ a, b, want []events.Hit }{
		{hits(), hits(), hits()},
		{hits(0, 1, 2, 1), hits(), hits(0, 1, 2, 1)},
		{hits(0, 1, 2, 1), hits(2, 1), hits(0, 1)},
		{hits(0, 1, 2, 1), hits(0, 1), hits(2, 1)},
		{hits(0, 1, 2, 1), hits(0, 1, 2, 1), hits()},
		{hits(0, 3, 2, 1), hits(0, 1, 2, 1), hits(0, 2)},
		{hits(0, 1), hits(1, 1), nil},
		{hits(0, 1), hits(0, 2), nil},
		{hits(), hits(0, 1), nil},
		{hits(1, 1), hits(0, 1, 1, 1), nil},
		// More packets, but small ones; as many, but bigger ones.
		{hits(0, 1), []events.Hit{{Index: 0, Packets: 2, Bytes: 84}}, nil},
		{hits(0, 2), []events.Hit{{Index: 0, Packets: 1, Bytes: 1000}}, nil},
	} {
		a := slices.Clone(tt.a)
		got := subtract(a, tt.b)
		if !slices.Equal(got, tt.want) || (got == nil) != (tt.want == nil) {
			t.Errorf("%v - %v: got %v, want %v", tt.a, tt.b, got, tt.want)
		}
		if !slices.Equal(a, tt.a) {
			t.Errorf("%v - %v: a is now %v", tt.a, tt.b, a)
		}
	}
}

const us = time.Microsecond

// aRun is a run of the table from entry to exit.
func aRun(entry, exit time.Duration, hs []events.Hit) *events.Step {
	return &events.Step{
		Kind: events.StepTable, Time: exit, CPU: 1, PF: events.PFIPv4, Hook: events.HookLocalIn, Verdict: events.NFAccept,
		Table: &events.TableRun{
			Name: "filter", ID: events.TableID{Private: 0xabc, Gen: 3}, Entry: entry, Hits: hs,
			Before: events.Packet{Len: 84}, After: events.Packet{Len: 84},
		},
	}
}

// TestSolve: INPUT is 0 "-s 10/8 -j ACCEPT", 1 "-s 10/8" (no target), 2 the policy.
func TestSolve(t *testing.T) {
	table := inputTable(t, []rule{{cond: true, target: "ACCEPT"}, {cond: true}}, nil)
	a := hits(0, 1)               // accepted at once
	b := hits(2, 1)               // the policy alone
	c := hits(1, 1, 2, 1)         // counted, then the policy
	ab := hits(0, 1, 2, 1)        // two runs
	abc := hits(0, 1, 1, 1, 2, 2) // three
	// The kernel's counters of a run that was interrupted: its own and the others'.
	for _, tt := range []struct {
		name   string
		sum    []events.Hit
		others []*events.Step
		want   []events.Hit
	}{
		{"one taken off", ab, []*events.Step{aRun(12*us, 14*us, b)}, a},
		{"the other one", ab, []*events.Step{aRun(12*us, 14*us, a)}, b},
		{"two taken off", abc, []*events.Step{aRun(12*us, 13*us, a), aRun(14*us, 15*us, b)}, c},
		{"one overlapped and left nothing", ab, []*events.Step{aRun(12*us, 14*us, b), aRun(15*us, 16*us, c)}, a},
		{"either would do", ab, []*events.Step{aRun(12*us, 14*us, a), aRun(15*us, 16*us, b)}, nil},
		{"nobody overlapped", ab, nil, nil},
		{"it was before", ab, []*events.Step{aRun(2*us, 9*us, b)}, nil},
		{"it was after", ab, []*events.Step{aRun(21*us, 22*us, b)}, nil},
		{"it reaches in at the start", ab, []*events.Step{aRun(2*us, 11*us, b)}, a},
		{"it reaches out at the end", ab, []*events.Step{aRun(19*us, 25*us, b)}, a},
		{"not in the sum", ab, []*events.Step{aRun(12*us, 14*us, c)}, nil},
		{"the rest is no path", hits(1, 1, 2, 1), []*events.Step{aRun(12*us, 14*us, b)}, nil},
		{"another generation", ab, []*events.Step{otherGen(aRun(12*us, 14*us, b))}, nil},
		{"another CPU", ab, []*events.Step{otherCPU(aRun(12*us, 14*us, b))}, nil},
		{"one of them unknown", ab, []*events.Step{aRun(12*us, 14*us, b), unresolved(aRun(15*us, 16*us, b))}, nil},
		{"too many", ab, []*events.Step{
			aRun(11*us, 12*us, b), aRun(11*us, 12*us, b), aRun(11*us, 12*us, b), aRun(11*us, 12*us, b), aRun(11*us, 12*us, b),
			aRun(11*us, 12*us, b), aRun(11*us, 12*us, b), aRun(11*us, 12*us, b), aRun(11*us, 12*us, b)}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSharedRuns()
			step := aRun(10*us, 20*us, tt.sum)
			for _, r := range append(tt.others, step) {
				s.add(events.Run{Step: r, Entry: r.Table.Entry, Exit: r.Time})
			}
			before := slices.Clone(tt.sum)
			if got := s.solve(table, step); !slices.Equal(got, tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
			if !slices.Equal(tt.sum, before) {
				t.Errorf("the run's hits are now %v", tt.sum)
			}
		})
	}
}

func otherGen(s *events.Step) *events.Step   { s.Table.ID.Gen++; return s }
func otherCPU(s *events.Step) *events.Step   { s.CPU++; return s }
func unresolved(s *events.Step) *events.Step { s.Table.Unresolved = "why"; return s }

// Old runs are forgotten, those of other CPUs apart.
func TestSharedRunsForget(t *testing.T) {
	s := newSharedRuns()
	for i := range 10 {
		at := time.Duration(i) * keepRuns / 4
		r := aRun(at, at+us, hits(0, 1))
		s.add(events.Run{Step: r, Entry: at, Exit: at + us})
	}
	if n := len(s.runs[cpuTable{1, 0xabc}]); n != 5 {
		t.Errorf("%d runs are kept, want those of one second: 5", n)
	}
}
