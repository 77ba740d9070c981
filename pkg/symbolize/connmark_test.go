package symbolize

import (
	"encoding/binary"
	"testing"
)

func connmarkEntry(mode byte, mark, ctMask, nfMask uint32) Entry {
	e := Entry{Kind: TargetExtension, Target: "CONNMARK", Revision: 1}
	for _, v := range []uint32{mark, ctMask, nfMask} {
		e.Data = binary.NativeEndian.AppendUint32(e.Data, v)
	}
	e.Data = append(e.Data, mode, 0, 0, 0)
	return e
}

func markEntry(mark, mask uint32) Entry {
	e := Entry{Kind: TargetExtension, Target: "MARK", Revision: 2}
	e.Data = binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, mark), mask)
	return e
}

func ifMark(mark, mask uint32, invert byte) Entry {
	data := binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, mark), mask)
	return Entry{Kind: TargetNext, Matches: []Match{{Name: "mark", Revision: 1, Data: append(data, invert, 0, 0, 0)}}}
}

func ifConnmark(mark, mask uint32) Entry {
	e := ifMark(mark, mask, 0)
	e.Matches[0].Name = "connmark"
	return e
}

const all = ^uint32(0)

func TestMarks(t *testing.T) {
	var (
		restore = connmarkEntry(connmarkRestore, 0, all, all)
		save    = connmarkEntry(connmarkSave, 0, all, all)
		low     = connmarkEntry(connmarkRestore, 0, 0xf, 0xf)
		five    = markEntry(5, all)
		unknown = Entry{Kind: TargetExtension, Target: "NOBODYKNOWS"}
		shift   = Entry{Kind: TargetExtension, Target: "CONNMARK", Revision: 2, Data: append(connmarkEntry(0, 0, all, all).Data[:12], 0, 4, connmarkRestore)}
	)
	for _, tt := range []struct {
		name  string
		way   []Entry
		at    int // the mark behind so many of them is asked for
		had   ConnMark
		seen  Seen
		want  uint32
		known bool
		no    bool // what is seen cannot be
	}{
		{"nothing sets it", []Entry{restore, five}, 1, ConnMark{}, Seen{5, 7}, 7, true, false},
		{"the packet tells", []Entry{low, save}, 1, ConnMark{}, Seen{0x107, 0x107}, 0x107, true, false},
		{"it is lost", []Entry{restore, five, save}, 1, ConnMark{}, Seen{5, 5}, 0, false, false},
		{"it is a new connection's", []Entry{restore, five, save}, 1, ConnMark{0, all}, Seen{5, 5}, 0, true, false},
		{"half of it is enough", []Entry{low, five, connmarkEntry(connmarkSave, 0, 0xf0, 0xf0)}, 1, ConnMark{}, Seen{5, 0x3}, 0x103, true, false},
		{"half of it is not", []Entry{low, five, connmarkEntry(connmarkSave, 0, 0x3, 0x3)}, 1, ConnMark{}, Seen{5, 0x1}, 0, false, false},
		{"set before", []Entry{connmarkEntry(connmarkSet, 9, all, 0), restore, five}, 2, ConnMark{}, Seen{5, 9}, 9, true, false},
		{"xored", []Entry{restore, five, connmarkEntry(connmarkSet, 3, 0, 0)}, 1, ConnMark{}, Seen{5, 7 ^ 3}, 7, true, false},
		{"somebody else set it", []Entry{restore, five}, 1, ConnMark{2, all}, Seen{5, 7}, 0, false, true},
		{"somebody else marked the packet", []Entry{restore, five}, 1, ConnMark{}, Seen{6, 7}, 0, false, true},
		{"both tell, another tale", []Entry{restore}, 1, ConnMark{}, Seen{1, 2}, 0, false, true},
		{"behind what nobody knows", []Entry{unknown, restore}, 2, ConnMark{}, Seen{7, 7}, 0, false, false},
		{"a rule says that it was 0", []Entry{restore, ifMark(0, all, 0), five, save}, 1, ConnMark{}, Seen{5, 5}, 0, true, false},
		{"half of it", []Entry{low, ifMark(3, 0xf, 0), five, save}, 1, ConnMark{}, Seen{5, 5}, 0x103, true, false},
		{"what it was not", []Entry{restore, ifMark(0, all, 1), five, save}, 1, ConnMark{}, Seen{5, 5}, 0, false, false},
		{"a rule and what is seen differ", []Entry{restore, ifMark(1, all, 0)}, 1, ConnMark{}, Seen{2, 2}, 0, false, true},
		{"a rule says it of the connection", []Entry{restore, ifConnmark(9, 0xff), five, connmarkEntry(connmarkSave, 0, 0xff, 0xff)}, 1, ConnMark{}, Seen{5, 0x705}, 0x709, true, false},
		{"shifted", []Entry{shift, five}, 1, ConnMark{}, Seen{5, 7}, 0, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := NewMarks(0x100)
			m.Tracked = true
			var at Marks
			for i := range tt.way {
				m.Meet(&tt.way[i])
				if i+1 == tt.at {
					at = m
				}
			}
			begin, ok := m.Begin(tt.had, &tt.seen)
			if ok == tt.no {
				t.Fatalf("%+v, %v", begin, ok)
			}
			got, known := at.Packet(begin)
			if known != tt.known || known && got != tt.want {
				t.Errorf("mark %#x, %v; want %#x, %v", got, known, tt.want, tt.known)
			}
		})
	}
}

// Without a conntrack entry CONNMARK does nothing.
func TestMarksUntracked(t *testing.T) {
	m := NewMarks(3)
	for _, mode := range []byte{connmarkSet, connmarkSave, connmarkRestore} {
		e := connmarkEntry(mode, 9, all, all)
		m.Meet(&e)
	}
	// Which a rule cannot have fitted.
	e := ifConnmark(1, all)
	if m.Meet(&e); len(m.facts) > 0 {
		t.Error("no connection has a mark")
	}
	if got, ok := m.Packet(ConnMark{}); got != 3 || !ok {
		t.Errorf("mark %#x, %v", got, ok)
	}
}

// What is told of marks is what targets made of them, whatever they are; and if the connection's is
// known to begin with, all is.
func FuzzMarks(f *testing.F) {
	f.Add([]byte("\x02\xff\xff\x05\x03\x05\xff\x00\x01\xff\xff\x00"), uint32(7), uint32(9))
	f.Add([]byte("\x02\xff\xff\x05\x07\xff\xff\x00\x01\xff\xff\x00"), uint32(7), uint32(9))
	f.Add([]byte("\x01\x0f\xf0\x00\x02\x3c\x3c\x00\x00\x81\x18\x42\x02\xff\x0f\x00"), uint32(0x55), uint32(0xaa))
	f.Fuzz(func(t *testing.T, ops []byte, packet, conn uint32) {
		m := NewMarks(packet)
		m.Tracked = true
		begin := conn
		type step struct {
			marks  Marks
			packet uint32
		}
		var steps []step
		for ; len(ops) >= 4 && len(steps) < 20; ops = ops[4:] {
			a, b, v := uint32(ops[1]), uint32(ops[2]), uint32(ops[3])
			e := connmarkEntry(ops[0]%4, v, a, b)
			switch ops[0] % 4 {
			case connmarkSet:
				conn = conn&^a ^ v
			case connmarkSave:
				conn = conn&^a ^ packet&b
			case connmarkRestore:
				packet = packet&^b ^ conn&a
			default:
				e = markEntry(v, a)
				if ops[0]&4 != 0 {
					e.Matches = append(ifMark(packet&b, b, 0).Matches, ifConnmark(conn&b, b).Matches...)
				}
				packet = packet&^a ^ v
			}
			m.Meet(&e)
			steps = append(steps, step{m, packet})
		}
		seen := Seen{packet, conn}
		had := ConnMark{begin, all}
		for _, begin := range []ConnMark{{}, had} {
			knows := begin == had
			begin, ok := m.Begin(begin, &seen)
			if !ok {
				t.Fatal("what was seen cannot be")
			}
			for i, s := range steps {
				if got, ok := s.marks.Packet(begin); ok && got != s.packet || !ok && knows {
					t.Fatalf("behind target %d: mark %#x, %v; want %#x", i+1, got, ok, s.packet)
				}
			}
		}
	})
}
