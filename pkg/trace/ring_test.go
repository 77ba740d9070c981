package trace

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"
)

// fakeRing is a ring of 64 bytes whose memory the test writes as the kernel does.
type fakeRing struct {
	ring
	positions [2]uint64
}

const fakeSize = 64

func newFakeRing() *fakeRing {
	f := &fakeRing{}
	f.epoll = -1
	f.consPos, f.prodPos = &f.positions[0], &f.positions[1]
	f.data = make([]byte, 2*fakeSize)
	return f
}

func (f *fakeRing) write(rec []byte, flags uint32) {
	hdr := binary.NativeEndian.AppendUint32(nil, uint32(len(rec))|flags)
	hdr = append(append(hdr, 0, 0, 0, 0), rec...)
	at := *f.prodPos
	for i, c := range hdr {
		f.data[(at+uint64(i))%fakeSize] = c
		f.data[(at+uint64(i))%fakeSize+fakeSize] = c // the second mapping
	}
	*f.prodPos = at + (uint64(len(hdr))+7)&^7
}

func TestRing(t *testing.T) {
	f := newFakeRing()
	if rec := f.next(); rec != nil {
		t.Fatalf("%q came out of an empty ring", rec)
	}
	// Lengths that wrap around, and are padded.
	for i := range 50 {
		want := bytes.Repeat([]byte(fmt.Sprint(i%10)), 1+i%23)
		if i%7 == 3 {
			f.write([]byte("discarded"), ringDiscard)
		}
		f.write(want, 0)
		before := *f.consPos
		if f.taken() >= f.written() {
			t.Fatalf("record %d: %d of %d bytes were taken", i, f.taken(), f.written())
		}
		rec := f.next()
		if f.taken() != f.written() {
			t.Fatalf("record %d: %d of %d bytes were taken with it", i, f.taken(), f.written())
		}
		if !bytes.Equal(rec, want) {
			t.Fatalf("record %d: %q, want %q", i, rec, want)
		}
		if *f.consPos != before {
			t.Fatalf("record %d was given back before it was read", i)
		}
		if rec := f.next(); rec != nil || *f.consPos != *f.prodPos {
			t.Fatalf("record %d: then came %q; given back up to %d of %d", i, rec, *f.consPos, *f.prodPos)
		}
	}
}
