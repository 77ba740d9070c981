package main

import (
	"errors"
	"fmt"
	"slices"
	"sync"
)

// generations are rulesets of type V that were read, by what tells each generation of each
// from all others.
type generations[K comparable, V interface {
	comparable
	size() int
}] struct {
	mu    sync.Mutex // guards what is below
	known map[K]V
	order []K // as they came
	total int // sizes of all
}

// maxKept bounds what is kept, in rules; the newest leastKept rulesets are kept whatever they
// have.
const (
	maxKept   = 1 << 17
	leastKept = 8
)

// get returns what is known of a generation, the zero V if nothing is.
func (g *generations[K, V]) get(id K) V {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.known[id]
}

func (g *generations[K, V]) keep(id K, rs V) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if old, ok := g.known[id]; ok {
		g.total -= old.size()
	} else {
		g.order = append(g.order, id)
	}
	if g.known == nil {
		g.known = map[K]V{}
	}
	g.known[id] = rs
	g.total += rs.size()
	// One that is still in use is read again.
	for g.total > maxKept && len(g.order) > leastKept {
		oldest := g.order[0]
		g.order = g.order[1:]
		g.total -= g.known[oldest].size()
		delete(g.known, oldest)
	}
}

// forget forgets those that gone says of.
func (g *generations[K, V]) forget(gone func(K) bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.order = slices.DeleteFunc(g.order, func(id K) bool {
		if !gone(id) {
			return false
		}
		g.total -= g.known[id].size()
		delete(g.known, id)
		return true
	})
}

// each calls f for all that are known.
func (g *generations[K, V]) each(f func(V)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, rs := range g.known {
		f(rs)
	}
}

// find returns what is known of a generation, and has the ruleset read while that may still be the
// one that is there: read keeps what it reads, and returns which generation that is. Where it is
// another, or cannot be read, find returns and keeps what lost makes of the cause. reading is held
// from before read is called until then.
func (g *generations[K, V]) find(id K, reading sync.Locker, read func() (K, V, error), lost func(error) V) V {
	var none V
	if rs := g.get(id); rs != none {
		return rs
	}
	reading.Lock()
	defer reading.Unlock()
	// It may have been read meanwhile.
	if rs := g.get(id); rs != none {
		return rs
	}
	got, rs, err := read()
	switch {
	case err != nil:
		err = fmt.Errorf("the ruleset could not be read: %w", err)
	case got == id && rs != none:
		return rs
	default:
		err = errors.New("the ruleset was replaced before it could be read")
	}
	rs = lost(err)
	g.keep(id, rs)
	return rs
}
