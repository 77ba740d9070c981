package main

import (
	"slices"
	"time"

	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/symbolize"
)

// keepRuns is how long runs are kept for those that overlapped with them.
const keepRuns = time.Second

// maxOverlaps bounds the search: 2^n sums are tried.
const maxOverlaps = 8

// sharedRuns tells apart runs of one table that overlapped on a CPU. Under full
// preemption the counters of a run of a task may have grown by the runs of
// other tasks too: what they matched is in the sum. A run whose own counters are one
// path is that path, for each path has just one end; the others are what is left when
// such runs are taken off.
type sharedRuns struct {
	runs map[cpuTable][]events.Run
}

type cpuTable struct {
	cpu     int
	private uint64
}

func newSharedRuns() *sharedRuns {
	return &sharedRuns{runs: map[cpuTable][]events.Run{}}
}

// add is told of each run that was not alone on its CPU by construction.
func (s *sharedRuns) add(r events.Run) {
	k := cpuTable{r.Step.CPU, r.Step.Table.ID.Private}
	old := s.runs[k]
	for len(old) > 0 && old[0].Exit < r.Exit-keepRuns {
		old = old[1:]
	}
	s.runs[k] = append(old, r)
}

// solve returns the hits that are the step's own, or nil if they cannot be told: if
// none or more than one way of taking off other runs leaves one path.
func (s *sharedRuns) solve(table *symbolize.Table, step *events.Step) []events.Hit {
	var others [][]events.Hit
	for _, r := range s.runs[cpuTable{step.CPU, step.Table.ID.Private}] {
		same := r.Exit == step.Time && r.Entry == step.Table.Entry
		if same || r.Exit < step.Table.Entry || r.Entry > step.Time {
			continue
		}
		t := r.Step.Table
		if t.Unresolved != "" || t.ID != step.Table.ID {
			return nil
		}
		if _, err := walk(table, r.Step, t.Hits); err == nil {
			others = append(others, t.Hits)
		}
	}
	if len(others) > maxOverlaps {
		return nil
	}
	var found []events.Hit
	for set := 1; set < 1<<len(others); set++ {
		rest := slices.Clone(step.Table.Hits)
		for i, hits := range others {
			if set&(1<<i) != 0 && rest != nil {
				rest = subtract(rest, hits)
			}
		}
		if rest == nil {
			continue
		}
		if _, err := walk(table, step, rest); err != nil {
			continue
		}
		if found != nil && !slices.Equal(found, rest) {
			return nil
		}
		found = rest
	}
	return found
}

// subtract takes b off a; both are sorted by index. It returns nil if b is not in a.
func subtract(a, b []events.Hit) []events.Hit {
	out := make([]events.Hit, 0, len(a))
	for _, h := range a {
		if len(b) > 0 && b[0].Index == h.Index {
			if b[0].Packets > h.Packets || b[0].Bytes > h.Bytes {
				return nil
			}
			h.Packets -= b[0].Packets
			h.Bytes -= b[0].Bytes
			b = b[1:]
			if h.Packets == 0 {
				continue
			}
		}
		out = append(out, h)
	}
	if len(b) > 0 {
		return nil
	}
	return out
}
