package symbolize

import "errors"

// Snapshot is one table of one namespace at one time.
type Snapshot struct {
	Table *Table
	// Texts has each entry's rule without "-A CHAIN ", "" for entries that are
	// no rules; nil where texts were not asked for.
	Texts []string
	// Native is empty where Texts are iptables-save's own; otherwise it says
	// why they were rendered here.
	Native string
}

// ReadSnapshot reads a table of a namespace, with its rules' texts if they are
// wanted. It wraps ErrNoTable where the namespace has no such table (and does
// not create it).
func ReadSnapshot(ns *Namespace, family Family, name string, texts bool) (*Snapshot, error) {
	var s *Snapshot
	err := ns.Do(func() error {
		var err error
		s, err = readSnapshot(family, name, texts)
		return err
	})
	return s, err
}

// readSnapshot does so in the calling thread's namespace.
func readSnapshot(family Family, name string, texts bool) (*Snapshot, error) {
	info, blob, err := readBlob(family, name)
	if err != nil {
		return nil, err
	}
	t, err := ParseTable(family, name, info, blob)
	if err != nil {
		return nil, err
	}
	s := &Snapshot{Table: t}
	if !texts {
		return s, nil
	}
	// The save program reads the table by itself: what it printed belongs to
	// this table only if the rules were the same before and after.
	save, err := saveTexts(family, name)
	if err == nil {
		_, after, afterErr := readBlob(family, name)
		switch {
		case afterErr != nil:
			err = afterErr
		case !sameRules(family, blob, after, t):
			err = errors.New("the rules changed while iptables-save read them")
		default:
			s.Texts, err = t.mapTexts(save)
		}
	}
	if err != nil {
		s.Native = err.Error()
		s.Texts = make([]string, len(t.Entries))
		for i := range t.Entries {
			s.Texts[i] = t.RuleText(i)
		}
	}
	return s, nil
}
