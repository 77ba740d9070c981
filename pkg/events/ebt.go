package events

import (
	"github.com/nftrace/nftrace/bpf"
)

const ebtNested = "another packet ran through the table at the same time"

// addEBT takes a run of a table of ebtables, in its order among what nf_tables tells.
func (d *draft) addEBT(raw []byte) error {
	r, err := recEBT(raw)
	if err != nil {
		return err
	}
	d.nft.add(nftRecord{ebt: r})
	return nil
}

// ebtRun adds a run of a table of ebtables.
func (a *Assembler) ebtRun(d *draft, part *Part, r *nftRecord) {
	c := &d.call
	t := d.runs.take()
	t.Name, t.ID, t.Hits, t.Part = r.ebt.name, TableID{Private: r.ebt.private, Gen: r.ebt.gen}, r.ebt.hits, part
	t.Rules, t.Met, t.Unresolved, t.Hotdrop = nil, t.Met[:0], "", ""
	t.ebt = EBTRun{Hook: r.ebt.hook, Verdict: int(r.ebt.verdict), Behind: r.changed}
	t.NFT, t.EBT = nil, &t.ebt
	t.Before = r.packet
	if t.Before == nil {
		t.Before = &part.Before
	}
	t.After = t.Before
	if r.changed != nil {
		t.After = r.changed
	}
	s := d.addStep()
	s.set(&c.pattern.place, StepTable, ns(r.ebt.ts), int(r.ebt.cpu))
	s.Table = t
	s.Verdict = t.ebt.Verdict
	if t.ebt.Hook == HookBrouting {
		s.Verdict = NFAccept // DROP routes the packet
	}
	if s.Verdict != NFAccept {
		t.After = nil
	}
	switch flags := r.ebt.flags; {
	case flags&uint32(bpf.NftraceRecFlagREC_F_NOENTRY) != 0:
		t.Unresolved = ebtNested
	case d.nft.gap:
		t.Unresolved = nftGap
	default:
		t.Unresolved = unresolved(flags)
	}
	if a.OnRun != nil {
		a.OnRun(s)
	}
}
