package render

import (
	"strconv"

	"github.com/nftrace/nftrace/pkg/events"
)

// hookName is the hook's name as the built-in chain at it is called.
func hookName(pf, hook uint8) string {
	var names []string
	switch pf {
	case events.PFARP: // include/uapi/linux/netfilter_arp.h
		names = []string{"INPUT", "OUTPUT", "FORWARD"}
	case events.PFNetdev:
		names = []string{"INGRESS", "EGRESS"}
	case events.PFBridge:
		names = []string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING", "BROUTING"}
	default:
		names = []string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING", "INGRESS"}
	}
	if int(hook) < len(names) {
		return names[hook]
	}
	return "hook " + strconv.Itoa(int(hook))
}

// tableHook is the name of the hook where a run of a table began.
func tableHook(s *events.Step) string {
	if s.Table.EBT != nil {
		return hookName(s.PF, s.Table.EBT.Hook)
	}
	return hookName(s.PF, s.Hook)
}

// familyName is the family's name as nft spells it.
func familyName(pf uint8) string {
	switch pf {
	case 0:
		return ""
	case events.PFInet:
		return "inet"
	case events.PFIPv4:
		return "ip"
	case events.PFARP:
		return "arp"
	case events.PFNetdev:
		return "netdev"
	case events.PFBridge:
		return "bridge"
	case events.PFIPv6:
		return "ip6"
	}
	return "family " + strconv.Itoa(int(pf))
}

// tablePrefix tells tables of one name apart where TRACE itself never speaks: ebtables and
// arptables have no TRACE, so that nothing of the kernel's is changed by "eb:" and "arp:", nor
// has nf_tables, whose tables are called by their family unless iptables-nft manages them.
func tablePrefix(s *events.Step) string {
	if t := s.Table; t != nil && t.NFT != nil && !t.NFT.Compat {
		return familyName(t.NFT.Family) + ":"
	}
	switch s.PF {
	case events.PFBridge:
		return "eb:"
	case events.PFARP:
		return "arp:"
	}
	return ""
}

// label is table:chain:type:number, unescaped.
func label(s *events.Step, r *events.Rule) string { return string(appendLabel(nil, s, r)) }

func appendLabel(b []byte, s *events.Step, r *events.Rule) []byte {
	b = append(b, tablePrefix(s)...)
	b = append(b, s.Table.Name...)
	b = append(b, ':')
	b = append(b, r.Chain...)
	b = append(b, ':')
	b = append(b, r.Type...)
	b = append(b, ':')
	return strconv.AppendInt(b, int64(r.Num), 10)
}
