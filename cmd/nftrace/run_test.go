package main

import (
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nftrace/nftrace/bpf"
	"github.com/nftrace/nftrace/pkg/events"
)

// fakeRecords has some records left of a packet that nobody wants, or somebody does, each of which has length
// 1. Where it circles, there are ever more of them, made at the time at or now; with pauses there is none
// behind each.
type fakeRecords struct {
	left, taken, live uint64
	wanted            bool
	at                time.Duration // 0: now
	circles, pauses   bool
	paused            bool
	stopped           time.Time
}

func (f *fakeRecords) Read(time.Time) ([]byte, error) {
	switch {
	case time.Since(f.stopped) > 10*time.Second:
		return nil, errors.New("it does not end")
	case f.left == 0:
		return nil, os.ErrDeadlineExceeded
	case f.pauses && !f.paused:
		f.paused = true
		return nil, os.ErrDeadlineExceeded
	case !f.circles:
		f.left--
	}
	f.taken++
	f.paused = false
	r := &bpf.NftraceRecDev{Hdr: bpf.NftraceRecHdr{Jid: 1, Seq: uint32(f.taken), Type: uint16(bpf.NftraceRecTypeREC_XMIT), Ts: uint64(f.at)}}
	if f.at == 0 {
		r.Hdr.Ts = uint64(monotonic())
	}
	if !f.wanted {
		r.Hdr.Flags = uint32(bpf.NftraceRecFlagREC_F_TENTATIVE)
	}
	return unsafe.Slice((*byte)(unsafe.Pointer(r)), unsafe.Sizeof(*r)), nil
}

func (f *fakeRecords) Written() uint64       { return f.taken + f.left }
func (f *fakeRecords) Taken() uint64         { return f.taken }
func (f *fakeRecords) Live() (uint64, error) { return f.live, nil }
func (f *fakeRecords) Stop() error           { f.stopped = time.Now(); return nil }

// What is in the buffer is read to its end, and what comes for ever is not.
func TestFinish(t *testing.T) {
	for _, tt := range []struct {
		name string
		from fakeRecords
		wait time.Duration
	}{
		{"nothing is under way", fakeRecords{left: 10}, time.Hour},
		{"a packet is, and nothing comes of it", fakeRecords{left: 10, live: 1}, tick},
		{"it goes round for ever", fakeRecords{left: 1 << 20, live: 1, circles: true}, 0},
		{"it goes round for a while", fakeRecords{left: 10, live: 1, circles: true}, 2 * tick},
	} {
		s, _ := forwarded(t)
		f := tt.from
		s.ring = &f
		if err := s.finish(tt.wait); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if f.taken < tt.from.left {
			t.Errorf("%s: %d of %d records were read", tt.name, f.taken, tt.from.left)
		}
		if over := time.Since(f.stopped) >= tt.wait; over != (f.live > 0) {
			t.Errorf("%s: it took %v", tt.name, time.Since(f.stopped))
		}
	}
}

// After the command has ended packets that are wanted are waited for, and only those; if they still come, that
// is said.
func TestDrain(t *testing.T) {
	for _, tt := range []struct {
		name string
		from fakeRecords
		long bool // it takes drainMax
		said bool
	}{
		{"nothing comes", fakeRecords{}, false, false},
		{"nothing comes but what was there", fakeRecords{left: 1009, wanted: true}, false, false},
		{"others come", fakeRecords{left: 1, circles: true, pauses: true}, false, false},
		{"more come", fakeRecords{left: 1, circles: true, pauses: true, wanted: true}, true, true},
		{"there is ever more to read, but all from before", fakeRecords{left: 1, circles: true, wanted: true, at: time.Second}, true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s, _ := forwarded(t)
			var said strings.Builder
			s.say, s.out.Renderer = &speaker{w: &said}, nothing{}
			f := tt.from
			f.stopped = time.Now()
			s.ring = &f
			start := time.Now()
			if err := s.drain(); err != nil {
				t.Fatal(err)
			}
			if long := time.Since(start) >= drainMax; long != tt.long {
				t.Errorf("it took %v", time.Since(start))
			}
			if got := strings.Contains(said.String(), "packets still came"); got != tt.said {
				t.Errorf("it said %q", &said)
			}
		})
	}
}

// Where nftrace is to end at once, it reads no more, but counts.
func TestEndsNow(t *testing.T) {
	s, _ := forwarded(t)
	s.ring = &fakeRecords{left: 1307, stopped: time.Now()}
	now := make(chan struct{})
	s.out.now = now
	close(now)
	if err := s.finish(time.Hour); !errors.Is(err, errNow) {
		t.Errorf("finish: %v", err)
	}
	if err := s.drop(); err != nil || s.dropped.records != 1307 {
		t.Errorf("%d records were dropped, want 1307: %v", s.dropped.records, err)
	}
}

// What is not written is lost by an interrupt only where there was one.
func TestPrintDropped(t *testing.T) {
	now := make(chan struct{})
	close(now)
	for _, tt := range []struct {
		name    string
		out     *output
		want    error
		dropped uint64
	}{
		{"interrupted again", &output{pipe: -1, w: io.Discard, stalls: true, now: now}, errNow, 2},
		{"the disk is full", &output{pipe: -1, w: failingWriter{}}, unix.ENOSPC, 0},
	} {
		s, _ := forwarded(t)
		tt.out.Renderer, s.out = large{}, tt.out
		j := &events.Journey{Outcome: events.Outcome{Step: -1}}
		if err := s.print([]*events.Journey{j, j, j}); !errors.Is(err, tt.want) || s.dropped.packets != tt.dropped {
			t.Errorf("%s: %v, %d packets dropped, want %d", tt.name, err, s.dropped.packets, tt.dropped)
		}
	}
}

// large fills the buffer with each packet.
type large struct{}

func (large) Append(b []byte, _ *events.Journey) []byte { return append(b, make([]byte, bufSize)...) }
