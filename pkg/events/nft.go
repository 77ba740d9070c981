package events

import (
	"github.com/nftrace/nftrace/bpf"
)

// nftPending is what nf_tables and ebtables told within a call of a hook whose record is still to
// come.
type nftPending struct {
	events []nftRecord
	packet *Packet    // the packet behind the newest one; nil: as at the call
	next   *Packet    // what it is behind the next one, if it changed
	gap    bool       // records are missing before or among them
	flow   *Flowtable // that sent the packet on
}

type nftRecord struct {
	rec     bpf.NftraceRecNft
	ebt     *ebtRecord // a run of ebtables, and not of nf_tables
	packet  *Packet    // when the rule met it; nil: as at the call
	changed *Packet    // what it was behind it, if that was another
}

// shot is a packet as it was seen within a hook.
type shot struct {
	packet Packet
	raw    bpf.NftracePkt // which packet has slices of
}

func (n *nftPending) reset() {
	n.events, n.packet, n.next, n.gap, n.flow = n.events[:0], nil, nil, false, nil
}

// begins tells whether a journey can begin with a record of that type.
func begins(t bpf.NftraceRecType) bool {
	switch t {
	case bpf.NftraceRecTypeREC_HOOK, bpf.NftraceRecTypeREC_NFT, bpf.NftraceRecTypeREC_SEEN, bpf.NftraceRecTypeREC_FLOW, bpf.NftraceRecTypeREC_EBT:
		return true
	}
	return false
}

func (d *draft) addNFT(raw []byte) error {
	r, err := recNFT(raw)
	if err != nil {
		return err
	}
	d.nft.add(nftRecord{rec: r})
	return nil
}

// add takes a record, of which the packets are not yet set.
func (n *nftPending) add(r nftRecord) {
	r.packet, r.changed = n.packet, n.next
	n.events = append(n.events, r)
	if n.next != nil {
		n.packet, n.next = n.next, nil
	}
}

// addShot takes the packet as it is behind the next rule; between is whether it is so before
// it, too.
func (d *draft) addShot(p *bpf.NftracePkt, between bool) {
	s := d.shots.take()
	s.raw = *p
	readPacket(&s.packet, &s.raw)
	if between {
		d.nft.packet = &s.packet
	} else {
		d.nft.next = &s.packet
	}
}

// nftEnds tells whether a run of a base chain is over with what nf_tables told.
func nftEnds(r *bpf.NftraceRecNft) bool {
	return r.What == uint8(bpf.NftraceNftWhatNFT_DID_POLICY) ||
		r.What == uint8(bpf.NftraceNftWhatNFT_DID_RULE) && nftCode(r) >= 0
}

// nftCode is a verdict as NFTEvent has it. The upper half of NF_QUEUE's is the queue's number, of which
// the upper ones are no sign.
func nftCode(r *bpf.NftraceRecNft) int {
	if r.Code < NFTReturn {
		return int(uint32(r.Code))
	}
	return int(r.Code)
}

const (
	nftMissed = "something that nf_tables did with the packet was not seen: the kernel skipped the probe"
	// nft_fwd_netdev.c, nft_synproxy.c and others free it, and nf_tables tells afterwards.
	nftGone = "the packet was gone before nf_tables told which rule took it"
	nftGap  = "records of what was done at the hook were lost"
)

// nftRuns adds the runs of base chains, and of ebtables' tables, that the newest part of a hook's
// call had.
func (a *Assembler) nftRuns(d *draft, part *Part) {
	c := &d.call
	all := d.nft.events
	part.Changed = d.nftChanged(part)
	for len(all) > 0 {
		n := 1
		if all[0].ebt != nil {
			a.ebtRun(d, part, &all[0])
			all = all[n:]
			continue
		}
		first := &all[0].rec
		for !nftEnds(&all[n-1].rec) && n < len(all) && all[n].ebt == nil && all[n].rec.Table == first.Table && all[n].rec.Base == first.Base {
			n++
		}
		a.nftRun(d, part, all[:n], first == &d.nft.events[0].rec)
		all = all[n:]
	}
	if p := d.nft.packet; p != nil {
		d.see(p)
		c.nftSeen = p
	}
	c.nftVerdict = d.j.Steps[len(d.j.Steps)-1].Verdict
}

// nftChanged tells whether the packet was changed among the rules of a part. Behind NAT it is
// another one anyway when it is first seen.
func (d *draft) nftChanged(part *Part) bool {
	last := d.nft.packet
	if last == nil || !part.AfterNAT {
		return last != nil
	}
	for i := range d.nft.events {
		e := &d.nft.events[i]
		if e.packet != nil && e.packet != last || e.changed != nil && e.changed != last {
			return true
		}
	}
	return !part.MarkKnown || part.Before.Mark != last.Mark
}

// nftRun adds one run. alone is whether nothing can have changed the packet before it in the
// part, but for xtables' tables.
func (a *Assembler) nftRun(d *draft, part *Part, recs []nftRecord, alone bool) {
	c := &d.call
	t := d.runs.take()
	first, last := &recs[0].rec, &recs[len(recs)-1].rec
	t.Name, t.ID, t.Hits, t.Part = string(cBytes(first.Name[:])), TableID{}, nil, part
	t.Rules, t.Met, t.Unresolved, t.Hotdrop = nil, t.Met[:0], "", ""
	t.After = nil
	t.nft = NFTRun{Family: first.Family, Table: first.Table, Base: first.Base, Chain: string(cBytes(first.ChainName[:])), Gen: first.Gen, Flipped: first.Flipped != 0, Runs: int(first.Runs), Events: t.nft.Events[:0]}
	t.NFT, t.EBT = &t.nft, nil
	for i := range recs {
		r := &recs[i].rec
		e := NFTEvent{What: NFTWhat(r.What), Rule: r.Rule, Chain: r.Chain, Code: nftCode(r), Packet: recs[i].packet}
		if e.Packet == nil {
			e.Packet = &part.Before
			e.Unsure = part.AfterNAT && part.Before.Data == nil // it was not seen
		}
		if r.Flags&uint8(bpf.NftracePktFlagPKT_F_CT) != 0 {
			ct := &ctStates[r.Ctinfo&7]
			e.CT, e.Reply = ct.state, ct.reply
		}
		t.nft.Events = append(t.nft.Events, e)
	}
	e := &t.nft.Events[0]
	t.SetBefore(e.Packet, e.CT, e.Reply)
	if now := recs[0].changed; now != nil {
		// By its first rule, or by whoever had the packet before.
		e.Unsure = !alone || part.AfterNAT || len(c.pattern.ran) > 0 || now.Len != e.Packet.Len
		if part.MarkKnown && e.Packet == &part.Before {
			// That was seen at the part's end, and this before.
			t.before = *now
			t.before.Mark = part.Before.Mark
			t.SetBefore(&t.before, e.CT, e.Reply)
		}
	}
	s := d.addStep()
	s.set(&c.pattern.place, StepTable, ns(last.Hdr.Ts), int(last.Hdr.Cpu))
	s.Table = t
	switch {
	case c.pattern.flags&uint32(bpf.NftraceRecFlagREC_F_NFTMISSED) != 0:
		t.Unresolved = nftMissed
	case d.nft.gap:
		t.Unresolved = nftGap
	case !nftEnds(last):
		t.Unresolved = nftGone
		s.Verdict = NFStolen
	}
	t.nft.Behind = recs[len(recs)-1].changed
	if nftEnds(last) {
		// NF_QUEUE has the queue's number in the upper half.
		s.Verdict = nftCode(last) & 0xff
	}
	if a.OnRun != nil {
		a.OnRun(s)
	}
}
