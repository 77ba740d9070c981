package symbolize

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
)

func TestParseTableFixture(t *testing.T) {
	tab := loadFixture(t, "docker.v4.filter").table
	if tab.HookEntry[forward] != 1 || tab.Underflow[forward] != 7 || tab.HookEntry[prerouting] != -1 {
		t.Errorf("hooks %v, policies %v", tab.HookEntry, tab.Underflow)
	}
	e := tab.Entries[at(t, tab, "DOCKER", 1)]
	if e.Header.InIface != "docker0" || e.Header.InvFlags != invIn || e.Header.Proto != 6 || !bytes.Equal(e.Header.Dst, []byte{172, 17, 0, 2}) {
		t.Errorf("header %+v", e.Header)
	}
	if len(e.Matches) != 1 || e.Matches[0].Name != "tcp" || e.Kind != TargetVerdict || e.Verdict != nfAccept {
		t.Errorf("%+v", e)
	}
	last := tab.Entries[len(tab.Entries)-1]
	if last.Kind != TargetError || last.Chain != "ERROR" || last.Num != 0 {
		t.Errorf("last entry %+v", last)
	}
	if tab.EntryOffset(0) != 0 || tab.EntryOffset(1) != 152 || tab.EntryOffset(-1) != -1 || tab.EntryOffset(len(tab.Entries)) != -1 {
		t.Error("EntryOffset")
	}

	tab = loadFixture(t, "goto.v4.filter").table
	if e := tab.Entries[at(t, tab, "INPUT", 1)]; e.Kind != TargetGoto || tab.Entries[e.Dest].Chain != "A" || tab.Entries[e.Dest].Num != 1 {
		t.Errorf("goto: %+v", e)
	}
	if e := tab.Entries[at(t, tab, "INPUT", 2)]; e.Kind != TargetNext {
		t.Errorf("no target: %+v", e)
	}
	if e := tab.Entries[at(t, tab, "A", 3)]; e.Header.InIface != "veth+" {
		t.Errorf("wildcard: %q", e.Header.InIface)
	}
	if e := tab.Entries[at(t, tab, "A", 4)]; !e.IsEnd {
		t.Errorf("end of A: %+v", e)
	}
	tab = loadFixture(t, "six.v6.filter").table
	if e := tab.Entries[at(t, tab, "FORWARD", 1)]; e.Kind != TargetGoto || tab.Entries[e.Dest].Chain != "six" || !e.always || e.uncond {
		t.Errorf("goto: %+v", e)
	}
}

func TestParseTableRefuses(t *testing.T) {
	family, info, name, blob := fixtureBytes(t, "docker.v4.filter")
	refuse := func(what string, change func(info *Info, b []byte) []byte) {
		t.Helper()
		i, b := info, bytes.Clone(blob)
		b = change(&i, b)
		if _, err := ParseTable(family, name, i, b); !errors.Is(err, ErrBlob) {
			t.Errorf("%s: %v", what, err)
		}
	}
	put16 := func(b []byte, at int, v uint16) []byte { binary.NativeEndian.PutUint16(b[at:], v); return b }
	refuse("short", func(i *Info, b []byte) []byte { return b[:len(b)-8] })
	refuse("cut", func(i *Info, b []byte) []byte { i.Size -= 8; return b[:len(b)-8] })
	refuse("too few entries", func(i *Info, b []byte) []byte { i.NumEntries--; return b })
	refuse("hook between entries", func(i *Info, b []byte) []byte { i.HookEntry[forward]++; return b })
	refuse("policy outside", func(i *Info, b []byte) []byte { i.Underflow[forward] = 1 << 31; return b })
	refuse("unknown hook", func(i *Info, b []byte) []byte { i.ValidHooks |= 1 << 7; return b })
	refuse("entry of no length", func(i *Info, b []byte) []byte { return put16(b, 90, 0) })
	refuse("target in the header", func(i *Info, b []byte) []byte { return put16(b, 88, 8) })
	refuse("target behind the entry", func(i *Info, b []byte) []byte { return put16(b, 88, 200) })
	refuse("target of no length", func(i *Info, b []byte) []byte { return put16(b, 112, 0) })
	refuse("jump between entries", func(i *Info, b []byte) []byte { return put16(b, 152+112+32, 13) })
	if _, err := ParseTable(7, name, info, blob); !errors.Is(err, ErrBlob) {
		t.Errorf("family: %v", err)
	}
}

func FuzzParseTable(f *testing.F) {
	for _, n := range fixtureNames(f) {
		family, info, _, blob := fixtureBytes(f, n)
		f.Add(uint8(family), append(putInfo(family, "x", info), blob...))
	}
	f.Fuzz(func(t *testing.T, number uint8, b []byte) {
		family := Family(number)
		if _, ok := layoutOf(family); !ok || len(b) < infoSize(family) {
			return
		}
		info := parseInfo(family, b)
		tab, err := ParseTable(family, "fuzz", info, b[infoSize(family):])
		if err != nil {
			if !errors.Is(err, ErrBlob) {
				t.Fatalf("untyped: %v", err)
			}
			return
		}
		n := len(tab.Entries)
		var hits []Hit
		for i := range tab.Entries {
			e := &tab.Entries[i]
			if e.Index != i || e.Dest < 0 || (e.Kind == TargetJump || e.Kind == TargetGoto) && e.Dest >= n {
				t.Fatalf("entry %d: %+v", i, e)
			}
			if got, ok := tab.indexAt(int64(tab.EntryOffset(i))); !ok || got != i {
				t.Fatalf("offset %d of entry %d leads to %d", e.Offset, i, got)
			}
			hits = append(hits, Hit{Index: i, Packets: 1 + uint64(i)%3})
			tab.RuleText(i)
			arp := PacketInfo{ARP: &[ARPLen]byte{}}
			if e.always && !tab.Plausible(i, arp) && family == ARP {
				t.Fatalf("entry %d matches every packet, and not this one", i)
			}
			if _, data, ok := tab.Apply(i, 0, arp.ARP[:]); ok && len(data) != ARPLen {
				t.Fatalf("entry %d makes %d bytes of the packet", i, len(data))
			}
		}
		for h := range NumHooks {
			if (tab.HookEntry[h] < 0) != (info.ValidHooks&(1<<h) == 0) || tab.HookEntry[h] >= n || tab.Underflow[h] >= n {
				t.Fatalf("hook %d: %d, %d of %d", h, tab.HookEntry[h], tab.Underflow[h], n)
			}
			for _, v := range []int{nfDrop, nfAccept} {
				if _, err := tab.Walk(h, hits, v, nil); err == nil && tab.HookEntry[h] < 0 {
					t.Fatal("a walk through a hook that is not there")
				}
			}
		}
	})
}
