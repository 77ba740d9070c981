package events

import "testing"

// Journeys are found by their IDs, also where there are more than lists.
func TestOpenDrafts(t *testing.T) {
	var o openDrafts
	const n = 4 << openBits
	id := func(i int) uint64 { return uint64(i%4)<<48 | uint64(i) } // as of several CPUs
	drafts := make([]*draft, n)
	for i := range drafts {
		drafts[i] = &draft{j: Journey{ID: id(i)}}
		o.add(drafts[i])
	}
	check := func(in func(i int) bool) {
		t.Helper()
		want := 0
		for i, d := range drafts {
			if !in(i) {
				d = nil
			} else {
				want++
			}
			if got := o.find(id(i)); got != d {
				t.Fatalf("journey %d: got %p, want %p", i, got, d)
			}
		}
		got := 0
		for range o.all {
			got++
		}
		if got != want {
			t.Errorf("%d journeys, want %d", got, want)
		}
	}
	check(func(int) bool { return true })
	for i := 0; i < n; i += 2 {
		o.remove(drafts[i])
	}
	check(func(i int) bool { return i%2 == 1 })
	for i := 1; i < n; i += 2 {
		o.remove(drafts[i])
	}
	check(func(int) bool { return false })
	for range o.all {
		t.Fatal("not empty")
	}
}
