package main

import (
	"errors"
	"slices"
	"sync"
	"testing"
)

type someRules struct{ err error }

func (*someRules) size() int { return 1 }

// What is found is of the generation that was asked for, or it says why there is none; either is
// read once.
func TestFindGeneration(t *testing.T) {
	is := &someRules{}
	for _, tt := range []struct {
		name string
		read func() (int, *someRules, error)
		want string // why not
	}{
		{"it", func() (int, *someRules, error) { return 7, is, nil }, ""},
		{"another", func() (int, *someRules, error) { return 8, is, nil }, "the ruleset was replaced before it could be read"},
		{"forgotten", func() (int, *someRules, error) { return 7, nil, nil }, "the ruleset was replaced before it could be read"},
		{"not read", func() (int, *someRules, error) { return 7, nil, errors.New("no") }, "the ruleset could not be read: no"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var g generations[int, *someRules]
			var reading sync.Mutex
			reads := 0
			find := func() *someRules {
				return g.find(7, &reading, func() (int, *someRules, error) {
					if reading.TryLock() {
						t.Error("reading is not held")
					}
					reads++
					id, rs, err := tt.read()
					if rs != nil {
						g.keep(id, rs)
					}
					return id, rs, err
				}, func(err error) *someRules { return &someRules{err} })
			}
			first := find()
			switch {
			case tt.want == "" && first != is:
				t.Errorf("got %v", first)
			case tt.want != "" && (first.err == nil || first.err.Error() != tt.want):
				t.Errorf("got %v, want %q", first.err, tt.want)
			}
			if find() != first || reads != 1 {
				t.Errorf("%d reads", reads)
			}
			if !reading.TryLock() {
				t.Error("reading is still held")
			}
		})
	}
}

// What is forgotten is not counted either, and the others stay.
func TestForgetGenerations(t *testing.T) {
	var g generations[int, *someRules]
	for id := range 7 {
		g.keep(id, &someRules{})
	}
	g.forget(func(id int) bool { return id%2 == 0 })
	g.keep(0, &someRules{})
	var left []int
	for id := range 7 {
		if g.get(id) != nil {
			left = append(left, id)
		}
	}
	if want := []int{0, 1, 3, 5}; !slices.Equal(left, want) || g.total != len(want) || len(g.order) != len(want) {
		t.Errorf("left %v, %d in order, sizes %d; want %v", left, len(g.order), g.total, want)
	}
}
