package main

import (
	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/symbolize"
)

// restored is what CONNMARK --restore-mark made of a packet's mark; ok is clear where that is not
// known.
type restored struct {
	mark uint32
	ok   bool
}

// restoredMarks tells so for each rule of a part's tables that restores the mark, in their order.
// others are what other engines did there.
//
// At PREROUTING and OUTPUT conntrack comes to know the packet behind table raw, and its
// connection's mark is seen behind the hook only, where rules may have set it. So the marks are
// followed with that left open, and what is seen behind tells it: bit by bit, see
// symbolize.Marks.
func restoredMarks(runs []tableRun, others []events.Step) []restored {
	part := runs[0].step.Table.Part
	m := symbolize.NewMarks(part.Before.Mark)
	// Behind NAT the packet was seen at its end only.
	if part.Changed || part.AfterNAT || setConn(others) {
		m.Lose()
	}
	var at []symbolize.Marks
	for i := range runs {
		run := &runs[i]
		m.Tracked = trackedAt(run.step)
		if m.Tracked && part.Before.CT != "" && !part.Before.HasCTMark {
			m.LoseConn()
		}
		if run.path == nil {
			if m.LoseConn(); run.opaque() {
				m.Lose()
			}
			continue
		}
		template := false
		for k := range run.path.Visits {
			e := run.entry(k)
			if template && e.RestoresMark() {
				m.Lose()
			}
			m.Meet(e)
			if e.RestoresMark() {
				at = append(at, m)
			}
			template = template || e.GivesTemplate()
		}
	}
	begin := connMark(part, &m)
	marks := make([]restored, len(at))
	for i := range at {
		marks[i].mark, marks[i].ok = at[i].Packet(begin)
	}
	return marks
}

// setConn tells whether rules of nf_tables may have set the mark of the packet's connection.
func setConn(others []events.Step) bool {
	for i := range others {
		if n := others[i].Table.NFT; n != nil && !n.LeavesConn {
			return true
		}
	}
	return false
}

// trackedAt tells whether the packet has a conntrack entry in a table.
func trackedAt(s *events.Step) bool {
	part := s.Table.Part
	if ct := part.Before.CT; ct != "" {
		return ct != "UNTRACKED"
	}
	first := s.Hook == events.HookPreRouting || s.Hook == events.HookLocalOut
	return part.Tracked && first && s.Table.Name != "raw"
}

// connMark is what is known of what the connection's mark was before a part, of which m was made
// there.
func connMark(part *events.Part, m *symbolize.Marks) symbolize.ConnMark {
	var begin symbolize.ConnMark
	after := part.After
	switch {
	case part.Before.HasCTMark:
		begin.Value, begin.Known = part.Before.CTMark, ^uint32(0)
	case after != nil && after.HasCTMark && after.CT == "NEW" && !after.CTConfirmed:
		// It is the first packet (nf_conntrack_core.c:init_conntrack).
		begin.Known = ^uint32(0)
	}
	var seen *symbolize.Seen
	if after != nil {
		seen = &symbolize.Seen{Packet: after.Mark, Conn: after.CTMark}
	}
	begin, ok := m.Begin(begin, seen)
	if !ok {
		return symbolize.ConnMark{}
	}
	return begin
}
