package events

// openDrafts are the journeys that are not complete, by ID: a map, but each packet is put
// into it and taken out again, which costs a map of Go's more than to find it.
type openDrafts [1 << openBits]*draft // lists

// openBits is how many lists there are, as a power of 2. The probes follow some thousand
// packets at once at the most.
const openBits = 12

func (o *openDrafts) list(id uint64) **draft {
	return &o[id*0x9e3779b97f4a7c15>>(64-openBits)]
}

// find returns the journey with that ID, nil if there is none.
func (o *openDrafts) find(id uint64) *draft {
	d := *o.list(id)
	for d != nil && d.j.ID != id {
		d = d.beside
	}
	return d
}

// add adds a journey whose ID none has.
func (o *openDrafts) add(d *draft) {
	list := o.list(d.j.ID)
	d.beside, *list = *list, d
}

// remove takes a journey out.
func (o *openDrafts) remove(d *draft) {
	at := o.list(d.j.ID)
	for *at != d {
		at = &(*at).beside
	}
	*at = d.beside
}

// all yields them in no particular order. They may not change meanwhile.
func (o *openDrafts) all(yield func(*draft) bool) {
	for _, d := range o {
		for ; d != nil; d = d.beside {
			if !yield(d) {
				return
			}
		}
	}
}
